"""The gated delta rule, chunk after chunk, in plain PyTorch with its own backward pass.

Shapes as in `common.chunks`: NT chunks of C tokens, B * H heads of a block of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_sleep.kernels.common import chunked_rule
from hybrid_sleep.kernels.common.chunks import (
    add_mm,
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
    Gamma_ij = exp(c_i - c_j) for i >= j, else 0:

        X = tril(K K^T * Gamma, -1)    A = diag(beta) X        M = (I + A)^-1
        W = V - exp(c) K S             U = M diag(beta) W      (what each token writes)
        P = scale Q K^T * Gamma        O = scale exp(c) Q S + P U
        S' = exp(c_C) S + (exp(c_C - c) K)^T U

    Token by token, U is a forward substitution: what a token writes depends on what the ones before
    it wrote under similar keys. M does all of a chunk in one product (the UT transform of
    arXiv:2412.06464, whose T is M diag(beta), applied here to W instead of to K and V apart: that
    saves a product and the tensors between).

    Only W, U and S' run from chunk to chunk.
    """
    inputs = (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH)
    return chunked_rule.run(RULE, inputs, initial_state, mask, scale, chunk_size, output)


# Entries of all the states that are kept at once without need, to read them in one product.
_MANY = 2**21


def _chunk_size(dim: int) -> int:
    """Longer chunks cost C products per token, shorter ones more passes over the [K, V] state."""
    return 24 if dim <= 32 else 32


class _Saved(NamedTuple):
    """What the backward pass reads.

    k_into and S are None where no chunk starts from a state, q and P where there is no output.
    """

    k: Tensor  # [NT, B * H, C, K]
    Gamma: Tensor  # [NT, B * H, C, C]
    X: Tensor
    M_beta: Tensor  # M diag(beta)
    W: Tensor  # [NT, B * H, C, V]
    U: Tensor
    left: Tensor  # exp(c_C - c) [NT, B * H, C, 1]
    k_left: Tensor  # left * k
    into: Tensor  # exp(c) [NT, B * H, C, 1]
    k_into: Tensor | None  # into * k
    S: Tensor | None  # the state each chunk starts from [NT, B * H, K, V]
    q: Tensor | None  # scaled
    P: Tensor | None


def _forward(
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
    B, T, H, K = k.shape
    BH, V = B * H, v.shape[-1]
    NT, C = split(T, chunk_size)
    first = 1 if initial_state is None else 0  # the first chunk that a state enters
    k = to_chunks(k, NT, C, dtype)
    W = to_chunks(v, NT, C, dtype)
    beta = to_chunks(beta, NT, C, dtype).unsqueeze(-1)
    c = log2_decays(g, NT, C)
    Gamma = decays_between(c, dtype)
    into, left = decays_at_ends(c, dtype)
    k_left = k * left
    k_into = k * into if first < NT else None

    X = mm(k, k.mT).mul_(Gamma)
    X.diagonal(dim1=2, dim2=3).zero_()
    # M diag(beta) as diag(beta) (I + X diag(beta))^-1, the same matrix.
    M_beta = unit_lower_inverse((X * beta.mT.neg()).flatten(0, 1)).view_as(Gamma).mul_(beta)

    P = q_into = read = None
    if q is not None:
        q = to_chunks(q, NT, C, dtype).mul_(scale)
        P = mm(q, k.mT).mul_(Gamma)
        q_into = q * into if first < NT else None
    all_states = keep or NT * BH * K * V <= _MANY
    if NT == 1:
        S = None if first else initial_state.to(dtype).reshape(1, BH, K, V)
    else:
        S = k.new_empty(NT if all_states else 2, BH, K, V)
        if first == 0:
            S[0].unflatten(0, (B, H)).copy_(initial_state)
        if q is not None and not all_states:
            read = torch.empty_like(W)
    U = torch.empty_like(W)
    _run(M_beta, W, U, k_left, k_into, q_into, into[:, :, -1:], S, final.flatten(0, 1), read, first)
    if q is not None:
        if read is not None:
            read[:first] = 0
            out = add_mm(read, P, U)
        else:
            out = mm(P, U)
            if first < NT:
                add_mm(out[first:], q_into[first:], S[first:])
        from_chunks(out, o)
    if not keep:
        return None
    return _Saved(k, Gamma, X, M_beta, W, U, left, k_left, into, k_into, S, q, P)


def _run(
    M_beta: Tensor,
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

    gamma is exp(c_C). S has room for every state that a chunk starts from, or for two, which
    alternate.
    """
    NT = len(M_beta)
    Ms, Ws, Us, lefts, gammas = (x.unbind(0) for x in (M_beta, W, U, k_left.mT, gamma))
    intos, reads, states = (() if x is None else x.unbind(0) for x in (k_into, q_into, S))
    for i in range(NT):
        after = states[(i + 1) % len(states)] if i + 1 < NT else final
        if i < first:
            torch.bmm(Ms[i], Ws[i], out=Us[i])
            torch.bmm(lefts[i], Us[i], out=after)
            continue
        before = states[i % len(states)]
        if read is not None:
            torch.bmm(reads[i], before, out=read[i])
        torch.bmm(Ms[i], Ws[i].baddbmm_(intos[i], before, alpha=-1), out=Us[i])
        torch.mul(before, gammas[i], out=after).baddbmm_(lefts[i], Us[i])


def _backward(
    saved: _Saved,
    do: Tensor | None,
    dS: Tensor | None,
    dS_0: Tensor | None,
    scale: float,
    first: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    k, Gamma, X, M_beta, W, U, left, k_left, into, k_into, S, q, P = saved
    NT, BH, C, K = k.shape
    shape = (BH, K, U.shape[-1])
    dS = k.new_zeros(shape) if dS is None else dS.to(k.dtype).reshape(shape)
    dS_0 = None if dS_0 is None else dS_0.flatten(0, 1)
    dS_after = dS[None]  # of the state after each chunk
    if NT > 1:
        dS_after = k.new_empty(NT, *shape)
        dS_after[-1] = dS
    dO = dO_into = None
    if do is not None:
        dO = to_chunks(do, NT, C, k.dtype)
        dU = mm(P.mT, dO)
        if first < NT:
            dO_into = dO * into
            mm(q[1:].mT, dO_into[1:], out=dS_after[:-1])
        if dS_0 is not None:
            torch.bmm(q[0].mT, dO_into[0], out=dS_0)
    else:
        dU = torch.zeros_like(U)
        dS_after[:-1] = 0
        if dS_0 is not None:
            dS_0.zero_()
    dW = torch.empty_like(W)
    _run_back(M_beta, dW, dU, k_left, k_into, into[:, :, -1:], (dS_0, *dS_after.unbind(0)))

    # U = beta * E with E = W - X U, and dE = dU - X^T dW: no division by a beta that may be 0.
    E = torch.baddbmm(W.flatten(0, 1), X.flatten(0, 1), U.flatten(0, 1), alpha=-1).view_as(W)
    dbeta = E.mul_(add_mm(dU, X.mT, dW, -1)).sum(-1)

    # Gamma_ij is a factor of X and of P: their products with their gradients are the pairs' terms
    # in the gradient of the gates.
    minus_dX = mm(dW, U.mT)
    pairs = (minus_dX * X).neg_()
    minus_dX.mul_(Gamma).diagonal(dim1=2, dim2=3).zero_()
    if do is not None:
        dP = mm(dO, U.mT)
        pairs.addcmul_(dP, P)
        dP.mul_(Gamma)
    dk = mm(minus_dX + minus_dX.mT, k).neg_()
    if do is not None:
        add_mm(dk, dP.mT, q)

    dk_left = mm(U, dS_after.mT)
    dk.addcmul_(dk_left, left)
    left_terms = dk_left.mul_(k_left).sum(-1)

    dq = None if do is None else torch.empty_like(q)
    if do is not None and first:
        mm(dP[:1], k[:1], out=dq[:1])
    read_terms = kept = None
    if first < NT:
        rest = slice(first, NT)
        minus_dk_into = mm(dW[rest], S[rest].mT)
        dk[rest].addcmul_(minus_dk_into, into[rest], value=-1)
        read = minus_dk_into.mul_(k_into[rest]).neg_()
        if do is not None:
            dq_into = mm(dO_into[rest], S[rest].mT, out=dq[rest])
            read.addcmul_(q[rest], dq_into)
            add_mm(dq_into, dP[rest], k[rest])
        read_terms = read.sum(-1)
        kept = (S[rest] * dS_after[rest]).sum((-1, -2)) * into[rest, :, -1, 0]
    if dq is not None:
        dq.mul_(scale)
    return dq, dk, dW, gate_gradient(pairs, read_terms, left_terms, kept), dbeta


def _run_back(
    M_beta: Tensor,
    dW: Tensor,
    dU: Tensor,
    k_left: Tensor,
    k_into: Tensor | None,
    gamma: Tensor,
    dS: tuple[Tensor | None, ...],
) -> None:
    """The serial part: completes dU and dS (which hold what O gave them) and fills dW.

    dS has one entry more than there are chunks, the first None where no gradient is needed.
    """
    Ms, dWs, dUs, lefts, gammas = (x.unbind(0) for x in (M_beta.mT, dW, dU, k_left, gamma))
    intos = () if k_into is None else k_into.mT.unbind(0)
    for i in reversed(range(len(Ms))):
        torch.bmm(Ms[i], dUs[i].baddbmm_(lefts[i], dS[i + 1]), out=dWs[i])
        if dS[i] is not None:
            dS[i].addcmul_(dS[i + 1], gammas[i]).baddbmm_(intos[i], dWs[i], alpha=-1)


RULE = chunked_rule.Rule(_chunk_size, lambda K, V: 6 * (K + V), _forward, _backward, _Saved)
