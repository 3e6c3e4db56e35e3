"""A state-space rule by chunks in plain PyTorch, with its own backward pass: what such rules share.

Here are the blocks of rows that a CPU works on at its best, the choice between autograd and none,
and what is kept for the backward pass; a rule adds the algebra of one block. The derivative is
written out because autograd would keep every intermediate of every chunk and walk the chunks once
for each operation. It is once differentiable; the `reference` of an op has every higher one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_sleep.kernels.common.checks import compute_dtype, full_precision, hide_pads
from hybrid_sleep.kernels.common.chunks import batch_blocks, from_chunks, split


class Rule(NamedTuple):
    """The algebra of one rule.

    chunk_size: of the larger of K and V, how long a chunk is fast.
    per_token: of (K, V), how many numbers a token of a head takes, beside 4 C in pairs of tokens.
    forward: of (q or None, k, v, *gates, initial_state, o, final, scale, chunk_size, dtype, keep),
        all of one block of rows, fills o and the final state and, with `keep`, returns a `saved`.
        The path to the state must never look at q, which keeps it the same to the last bit whether
        or not there is an output.
    backward: of (saved, do, dS, dS_0, scale, first), the gradients of q (None without do), k, v and
        the gates as chunks; fills dS_0 unless it is None. `first` is the first chunk that a state
        enters: 1 without an initial state.
    saved: a named tuple of tensors.
    """

    chunk_size: Callable[[int], int]
    per_token: Callable[[int, int], int]
    forward: Callable[..., Any]
    backward: Callable[..., tuple[Tensor | None, ...]]
    saved: type[Any]


def run(
    rule: Rule,
    inputs: tuple[Tensor, ...],
    initial_state: Tensor | None,
    mask: Tensor | None,
    scale: float,
    chunk_size: int | None,
    output: bool,
) -> tuple[Tensor | None, Tensor]:
    """o [B, T, H, V] (None without output) and S [B, H, K, V]; inputs are q, k, v and the gates."""
    q, k, v, *gates = inputs
    dtype = compute_dtype(q, k, v)
    inputs = hide_pads(mask, q if output else None, k, v, *gates)
    if chunk_size is None:
        chunk_size = rule.chunk_size(max(k.shape[-1], v.shape[-1]))
    leaves = [x for x in (*inputs, initial_state) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        return _Chunked.apply(rule, scale, chunk_size, dtype, initial_state, *inputs)
    o, S, _ = _forward(rule, scale, chunk_size, dtype, initial_state, inputs, keep=False)
    return o, S


def _blocks(
    rule: Rule, B: int, T: int, H: int, K: int, V: int, chunk_size: int, device: torch.device
) -> list[slice]:
    """Depends on nothing but the sizes: with or without output, S takes the same path."""
    NT, C = split(T, chunk_size)
    elements = H * (T * (rule.per_token(K, V) + 4 * C) + (NT + 2) * K * V)
    return batch_blocks(B, elements, device)


def _forward(
    rule: Rule,
    scale: float,
    chunk_size: int,
    dtype: torch.dtype,
    initial_state: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    keep: bool,
) -> tuple[Tensor | None, Tensor, list[Any]]:
    """o, S and, with `keep`, what the backward pass needs of each block of rows; no o without q."""
    q, k, v = inputs[:3]
    (B, T, H, V), K = v.shape, k.shape[-1]
    o = None if q is None else v.new_empty(v.shape)
    S = v.new_empty((B, H, K, V), dtype=dtype)
    saved = []
    for rows in _blocks(rule, B, T, H, K, V, chunk_size, v.device):
        block = (None if x is None else x[rows] for x in (*inputs, initial_state, o, S))
        saved.append(rule.forward(*block, scale, chunk_size, dtype, keep))
    return o, S, saved


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rule, scale, chunk_size, dtype, initial_state, *inputs):
        o, S, saved = _forward(rule, scale, chunk_size, dtype, initial_state, inputs, keep=True)
        ctx.save_for_backward(*(tensor for block in saved for tensor in block))
        _, k, *others = inputs
        ctx.given = rule, scale, chunk_size, dtype
        # q has the shape of k, and may not be there.
        ctx.shapes = [x.shape for x in (k, k, *others)]
        ctx.dtypes = [None if x is None else x.dtype for x in (initial_state, *inputs)]
        ctx.set_materialize_grads(False)
        return o, S

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dS):
        rule, scale, chunk_size, dtype = ctx.given
        state_dtype, q_dtype, *dtypes = ctx.dtypes
        dtypes = (None if do is None else q_dtype, *dtypes)
        tensors = ctx.saved_tensors
        like = tensors[0]
        grads = [
            None if kind is None else like.new_empty(shape, dtype=kind)
            for shape, kind in zip(ctx.shapes, dtypes, strict=True)
        ]
        K, (B, T, H, V) = ctx.shapes[1][-1], ctx.shapes[2]
        dS_0 = None
        if ctx.needs_input_grad[4]:
            dS_0 = like.new_empty((B, H, K, V), dtype=dtype)
        fields = len(rule.saved._fields)
        first = 1 if state_dtype is None else 0
        with full_precision(like):
            for at, rows in enumerate(_blocks(rule, B, T, H, K, V, chunk_size, like.device)):
                saved = rule.saved(*tensors[at * fields : (at + 1) * fields])
                block = (None if x is None else x[rows] for x in (do, dS, dS_0))
                chunks = rule.backward(saved, *block, scale, first)
                for grad, x in zip(grads, chunks, strict=True):
                    if grad is not None:
                        from_chunks(x, grad[rows])
        dS_0 = None if dS_0 is None else dS_0.to(state_dtype)
        return None, None, None, None, dS_0, *grads
