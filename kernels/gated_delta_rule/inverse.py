"""Inverses of many small unit lower triangular matrices at once."""

from __future__ import annotations

import torch
from torch import Tensor

# Longest side eliminated row by row; above it, halves and two matrix products are faster.
_ELIMINATE = 24
# Fewer matrices than this leave elimination waiting on overhead, and LAPACK ahead of it.
_FEW = 32


def unit_lower_inverse(minus_A: Tensor) -> Tensor:
    """M = (I + A)^-1 from -A [count, C, C], A strictly lower triangular with its zeros.

    Forward substitution and block merges throughout: no power of A is ever formed, so equal keys
    (entries that add up to binomials in a power series) cost no accuracy.
    """
    count, C, _ = minus_A.shape
    if count < _FEW:
        eye = torch.eye(C, dtype=minus_A.dtype, device=minus_A.device).expand(count, C, C)
        return torch.linalg.solve_triangular(minus_A.neg(), eye, upper=False, unitriangular=True)
    if C <= _ELIMINATE:
        return _eliminate(minus_A)
    top = (C + 1) // 2
    rest = C - top
    halves = minus_A.new_zeros(2, count, top, top)
    halves[0] = minus_A[:, :top, :top]
    halves[1, :, :rest, :rest] = minus_A[:, top:, top:]
    upper, lower = unit_lower_inverse(halves.flatten(0, 1)).unflatten(0, (2, count)).unbind(0)
    lower = lower[:, :rest, :rest]
    M = torch.zeros_like(minus_A)
    M[:, :top, :top] = upper
    M[:, top:, top:] = lower
    M[:, top:, :top] = torch.bmm(torch.bmm(lower, minus_A[:, top:, :top]), upper)
    return M


def _eliminate(minus_A: Tensor) -> Tensor:
    """Row operations on [C, C, count], so that each one is a long vector over the matrices."""
    count, C, _ = minus_A.shape
    rows = minus_A.new_empty(C * C, count).copy_(minus_A.reshape(count, C * C).t())
    rows = rows.view(C, C, count)
    for i in range(1, C - 1):
        below = rows[i + 1 :]
        # Column i still holds -A here: earlier steps wrote only to the columns before it.
        below.narrow(1, 0, i).addcmul_(below.narrow(1, i, 1), rows[i : i + 1].narrow(1, 0, i))
    M = rows.view(C * C, count).t().contiguous().view(count, C, C)
    M.diagonal(dim1=1, dim2=2).fill_(1)
    return M
