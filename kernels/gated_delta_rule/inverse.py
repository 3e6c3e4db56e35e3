"""Inverses of many small unit lower triangular matrices at once."""

from __future__ import annotations

import torch
from torch import Tensor

# Longest side eliminated row by row; above it, halves and two matrix products are faster.
_ELIMINATE = 24
# Fewer matrices than this leave elimination waiting on overhead, and LAPACK ahead of it.
_FEW = 32


def unit_lower_inverse(A_MCC: Tensor) -> Tensor:
    """(I - A)^-1 for strictly lower triangular A [M, C, C], zeros included.

    Forward substitution and block merges throughout:
    no power of A is ever formed, so equal keys (entries that add up to binomials in a power series)
    cost no accuracy.
    """
    M, C, _ = A_MCC.shape
    if M < _FEW:
        eye = torch.eye(C, dtype=A_MCC.dtype, device=A_MCC.device).expand(M, C, C)
        return torch.linalg.solve_triangular(A_MCC.neg(), eye, upper=False, unitriangular=True)
    if C <= _ELIMINATE:
        return _eliminate(A_MCC)
    top = (C + 1) // 2
    rest = C - top
    halves = A_MCC.new_zeros(2, M, top, top)
    halves[0] = A_MCC[:, :top, :top]
    halves[1, :, :rest, :rest] = A_MCC[:, top:, top:]
    upper, lower = unit_lower_inverse(halves.flatten(0, 1)).unflatten(0, (2, M)).unbind(0)
    lower = lower[:, :rest, :rest]
    inverse = torch.zeros_like(A_MCC)
    inverse[:, :top, :top] = upper
    inverse[:, top:, top:] = lower
    inverse[:, top:, :top] = torch.bmm(torch.bmm(lower, A_MCC[:, top:, :top]), upper)
    return inverse


def _eliminate(A_MCC: Tensor) -> Tensor:
    """Row operations with the matrices side by side in memory, so each one is a long vector."""
    M, C, _ = A_MCC.shape
    X_CCM = A_MCC.new_empty(C * C, M).copy_(A_MCC.reshape(M, C * C).t()).view(C, C, M)
    for i in range(1, C - 1):
        below = X_CCM[i + 1 :]
        # Column i still holds A here: earlier steps wrote only to the columns before it.
        below.narrow(1, 0, i).addcmul_(below.narrow(1, i, 1), X_CCM[i : i + 1].narrow(1, 0, i))
    inverse = X_CCM.view(C * C, M).t().contiguous().view(M, C, C)
    inverse.diagonal(dim1=1, dim2=2).fill_(1)
    return inverse
