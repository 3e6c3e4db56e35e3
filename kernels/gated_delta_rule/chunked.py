"""The gated delta rule, chunk after chunk, in plain PyTorch with its own backward pass.

Shapes as in `kernels.chunks`: N chunks of C tokens, M = B * H rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_sleep.kernels.common.checks import compute_dtype, full_precision, hide_pads
from hybrid_sleep.kernels.common.chunks import (
    add_mm,
    batch_blocks,
    decays_at_ends,
    decays_between,
    from_chunks,
    gate_gradient,
    log2_decays,
    mm,
    split,
    to_chunks,
)
from hybrid_sleep.kernels.gated_delta_rule.inverse import unit_lower_inverse


def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    scale: float,
    chunk_size: int | None,
    output: bool,
) -> tuple[Tensor | None, Tensor]:
    """Inside a chunk that starts from S, with c_i the sum of g up to token i and
    D_ij = exp(c_i - c_j) for i >= j, else 0:

        X = tril(K K^T * D, -1)    T = diag(beta) (I + X diag(beta))^-1
        W = V - exp(c) K S         U = T W  (what each token writes under its key)
        P = scale Q K^T * D        O = scale exp(c) Q S + P U
        S' = exp(c_C) S + (exp(c_C - c) K)^T U

    (The chunkwise form of arXiv:2412.06464, with T applied to W instead of to K and V apart.)

    Only W, U and S' run from chunk to chunk. The derivative is once differentiable; `reference`
    has every higher one.
    """
    dtype = compute_dtype(q_BTHK, k_BTHK, v_BTHV)
    inputs = hide_pads(mask, q_BTHK if output else None, k_BTHK, v_BTHV, g_BTH, beta_BTH)
    if chunk_size is None:
        chunk_size = _chunk_size(max(k_BTHK.shape[-1], v_BTHV.shape[-1]))
    leaves = [x for x in (*inputs, initial_state) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        return _ChunkedGatedDelta.apply(*inputs, initial_state, scale, chunk_size, dtype)
    o, S, _ = _forward(*inputs, initial_state, scale, chunk_size, dtype, keep=False)
    return o, S


def _blocks(
    B: int, T: int, H: int, K: int, V: int, chunk_size: int, device: torch.device
) -> list[slice]:
    """Depends on nothing but the sizes: with or without output, S takes the same path."""
    N, C = split(T, chunk_size)
    return batch_blocks(B, H * (T * (6 * (K + V) + 4 * C) + (N + 2) * K * V), device)


# Entries of all the states that are kept at once without need, to read them in one product.
_MANY = 2**21


def _chunk_size(dim: int) -> int:
    """Longer chunks cost C products per token, shorter ones more passes over the [K, V] state."""
    return 24 if dim <= 32 else 32


class _Saved(NamedTuple):
    """What the backward pass reads.

    k_into and S are None where no chunk starts from a state, q and P where no output was asked for.
    """

    k: Tensor  # [N, M, C, K]
    D: Tensor  # [N, M, C, C]
    X: Tensor
    T: Tensor
    W: Tensor  # [N, M, C, V]
    U: Tensor
    left: Tensor  # exp(c_C - c) [N, M, C, 1]
    k_left: Tensor  # left * k
    into: Tensor  # exp(c) [N, M, C, 1]
    k_into: Tensor | None  # into * k
    S: Tensor | None  # the state each chunk starts from [N, M, K, V]
    q: Tensor | None  # scaled
    P: Tensor | None


def _forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor | None, Tensor, list[_Saved]]:
    """o, S and, with `keep`, what the backward pass needs of each block of rows; no o without q."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    o = None if q is None else v.new_empty(v.shape)
    S = v.new_empty((B, H, K, V), dtype=dtype)
    saved = []
    for rows in _blocks(B, T, H, K, V, chunk_size, k.device):
        block = (None if x is None else x[rows] for x in (q, k, v, g, beta, initial_state, o, S))
        saved.append(_forward_block(*block, scale, chunk_size, dtype, keep))
    return o, S, saved


def _forward_block(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    o: Tensor | None,
    final: Tensor,
    scale: float,
    chunk_size: int,
    dtype: torch.dtype,
    keep: bool,
) -> _Saved | None:
    """Fills o and the final state.

    The path to the state never looks at q, which keeps it the same to the last bit.
    """
    B, T, H, K = k.shape
    M, V = B * H, v.shape[-1]
    N, C = split(T, chunk_size)
    first = 1 if initial_state is None else 0  # the first chunk that a state enters
    k = to_chunks(k, N, C, dtype)
    W = to_chunks(v, N, C, dtype)
    beta = to_chunks(beta, N, C, dtype).unsqueeze(-1)
    c = log2_decays(g, N, C)
    D = decays_between(c, dtype)
    into, left = decays_at_ends(c, dtype)
    k_left = k * left
    k_into = k * into if first < N else None

    X = mm(k, k.mT).mul_(D)
    X.diagonal(dim1=2, dim2=3).zero_()
    T_ = unit_lower_inverse((X * beta.mT.neg()).flatten(0, 1)).view_as(D).mul_(beta)

    P = q_into = read = None
    if q is not None:
        q = to_chunks(q, N, C, dtype).mul_(scale)
        P = mm(q, k.mT).mul_(D)
        q_into = q * into if first < N else None
    all_states = keep or N * M * K * V <= _MANY
    if N == 1:
        S = None if first else initial_state.to(dtype).reshape(1, M, K, V)
    else:
        S = k.new_empty(N if all_states else 2, M, K, V)
        if first == 0:
            S[0].unflatten(0, (B, H)).copy_(initial_state)
        if q is not None and not all_states:
            read = torch.empty_like(W)
    U = torch.empty_like(W)
    _run(T_, W, U, k_left, k_into, q_into, into[:, :, -1:], S, final.flatten(0, 1), read, first)
    if q is not None:
        if read is not None:
            read[:first] = 0
            out = add_mm(read, P, U)
        else:
            out = mm(P, U)
            if first < N:
                add_mm(out[first:], q_into[first:], S[first:])
        from_chunks(out, o)
    return _Saved(k, D, X, T_, W, U, left, k_left, into, k_into, S, q, P) if keep else None


def _run(
    T_: Tensor,
    W: Tensor,
    U: Tensor,
    k_left: Tensor,
    k_into: Tensor | None,
    q_into: Tensor | None,
    gamma: Tensor,
    S: Tensor | None,
    final: Tensor,
    read: Tensor | None,
    first: int,
) -> None:
    """The serial part: turns V into W and fills U, S, final and, if given, what is read from S.

    S has room for every state that a chunk starts from, or for two of them in turn.
    """
    N = len(T_)
    T_, W, U, k_left, gamma = (x.unbind(0) for x in (T_, W, U, k_left.mT, gamma))
    k_into, q_into, states = (() if x is None else x.unbind(0) for x in (k_into, q_into, S))
    for n in range(N):
        after = states[(n + 1) % len(states)] if n + 1 < N else final
        if n < first:
            torch.bmm(T_[n], W[n], out=U[n])
            torch.bmm(k_left[n], U[n], out=after)
            continue
        before = states[n % len(states)]
        if read is not None:
            torch.bmm(q_into[n], before, out=read[n])
        torch.bmm(T_[n], W[n].baddbmm_(k_into[n], before, alpha=-1), out=U[n])
        torch.mul(before, gamma[n], out=after).baddbmm_(k_left[n], U[n])


class _ChunkedGatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial_state, scale, chunk_size, dtype):
        o, S, saved = _forward(q, k, v, g, beta, initial_state, scale, chunk_size, dtype, keep=True)
        ctx.save_for_backward(*(tensor for block in saved for tensor in block))
        ctx.given = k.shape, v.shape, scale, chunk_size, dtype
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, v, g, beta, initial_state)]
        ctx.set_materialize_grads(False)
        return o, S

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dS):
        (B, T, H, K), v_shape, scale, chunk_size, dtype = ctx.given
        q_dtype, *dtypes, state_dtype = ctx.dtypes
        dtypes = (None if do is None else q_dtype, *dtypes)
        tensors = ctx.saved_tensors
        like = tensors[0]
        shapes = ((B, T, H, K), (B, T, H, K), v_shape, (B, T, H), (B, T, H))
        grads = [
            None if kind is None else like.new_empty(shape, dtype=kind)
            for shape, kind in zip(shapes, dtypes, strict=True)
        ]
        dS_0 = None
        if ctx.needs_input_grad[5]:
            dS_0 = like.new_empty((B, H, K, v_shape[-1]), dtype=dtype)
        fields = len(_Saved._fields)
        first = 1 if state_dtype is None else 0
        blocks = _blocks(B, T, H, K, v_shape[-1], chunk_size, like.device)
        with full_precision(like):
            for n, rows in enumerate(blocks):
                saved = _Saved(*tensors[n * fields : (n + 1) * fields])
                block = (None if x is None else x[rows] for x in (do, dS, dS_0))
                chunks = _backward(saved, *block, scale, first)
                for grad, x in zip(grads, chunks, strict=True):
                    if grad is not None:
                        from_chunks(x, grad[rows])
        return *grads, None if dS_0 is None else dS_0.to(state_dtype), None, None, None


def _backward(
    saved: _Saved,
    do: Tensor | None,
    dS: Tensor | None,
    dS_0: Tensor | None,
    scale: float,
    first: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta of one block, as chunks; fills dS_0, if it is asked for."""
    k, D, X, T_, W, U, left, k_left, into, k_into, S, q, P = saved
    N, M, C, K = k.shape
    shape = (M, K, U.shape[-1])
    dS = k.new_zeros(shape) if dS is None else dS.to(k.dtype).reshape(shape)
    dS_0 = None if dS_0 is None else dS_0.flatten(0, 1)
    dS_N = dS[None]  # of the state after each chunk
    if N > 1:
        dS_N = k.new_empty(N, *shape)
        dS_N[-1] = dS
    dO = dO_into = None
    if do is not None:
        dO = to_chunks(do, N, C, k.dtype)
        dU = mm(P.mT, dO)
        if first < N:
            dO_into = dO * into
            mm(q[1:].mT, dO_into[1:], out=dS_N[:-1])
        if dS_0 is not None:
            torch.bmm(q[0].mT, dO_into[0], out=dS_0)
    else:
        dU = torch.zeros_like(U)
        dS_N[:-1] = 0
        if dS_0 is not None:
            dS_0.zero_()
    dW = torch.empty_like(W)
    _run_back(T_, dW, dU, k_left, k_into, into[:, :, -1:], (dS_0, *dS_N.unbind(0)))

    # U = beta * E with E = W - X U, and dE = dU - X^T dW: no division by a beta that may be 0.
    E = torch.baddbmm(W.flatten(0, 1), X.flatten(0, 1), U.flatten(0, 1), alpha=-1).view_as(W)
    dbeta = E.mul_(add_mm(dU, X.mT, dW, -1)).sum(-1)

    # What D_ij is a factor of: X and P, so that these are the pairs' shares in the gate's gradient.
    minus_dX = mm(dW, U.mT)
    pairs = (minus_dX * X).neg_()
    minus_dX.mul_(D).diagonal(dim1=2, dim2=3).zero_()
    if do is not None:
        dP = mm(dO, U.mT)
        pairs.addcmul_(dP, P)
        dP.mul_(D)
    dk = mm(minus_dX + minus_dX.mT, k).neg_()
    if do is not None:
        add_mm(dk, dP.mT, q)

    dk_left = mm(U, dS_N.mT)
    dk.addcmul_(dk_left, left)
    left_shares = dk_left.mul_(k_left).sum(-1)

    dq = None if do is None else torch.empty_like(q)
    if do is not None and first:
        mm(dP[:1], k[:1], out=dq[:1])
    read_shares = kept = None
    if first < N:
        rest = slice(first, N)
        minus_dk_into = mm(dW[rest], S[rest].mT)
        dk[rest].addcmul_(minus_dk_into, into[rest], value=-1)
        read = minus_dk_into.mul_(k_into[rest]).neg_()
        if do is not None:
            dq_into = mm(dO_into[rest], S[rest].mT, out=dq[rest])
            read.addcmul_(q[rest], dq_into)
            add_mm(dq_into, dP[rest], k[rest])
        read_shares = read.sum(-1)
        kept = (S[rest] * dS_N[rest]).sum((-1, -2)) * into[rest, :, -1, 0]
    if dq is not None:
        dq.mul_(scale)
    return dq, dk, dW, gate_gradient(pairs, read_shares, left_shares, kept), dbeta


def _run_back(
    T_: Tensor,
    dW: Tensor,
    dU: Tensor,
    k_left: Tensor,
    k_into: Tensor | None,
    gamma: Tensor,
    dS: tuple[Tensor | None, ...],
) -> None:
    """The serial part: completes dU and dS (which hold what O gave them) and fills dW.

    dS has one entry more than there are chunks, the first None where nobody asks for it.
    """
    T_, dW, dU, k_left, gamma = (x.unbind(0) for x in (T_.mT, dW, dU, k_left, gamma))
    k_into = () if k_into is None else k_into.mT.unbind(0)
    for n in reversed(range(len(T_))):
        torch.bmm(T_[n], dU[n].baddbmm_(k_left[n], dS[n + 1]), out=dW[n])
        if dS[n] is not None:
            dS[n].addcmul_(dS[n + 1], gamma[n]).baddbmm_(k_into[n], dW[n], alpha=-1)
