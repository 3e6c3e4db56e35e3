"""The edit in closed form: few columns of keys instead of a matrix over all of them.

Meng, Sharma, Andonian, Belinkov, Bau, "Mass-Editing Memory in a Transformer", arXiv 2210.07229,
Eq. 14, with the keys of earlier edits added to what is preserved (arXiv 2605.26670), solved in its
dual form. For new keys `K: [d, n]`, residuals `R: [o, n]`, past keys `Kp: [d, p]` and a positive
definite A (see `Preconditioner`), the edit D: `[o, d]` that minimises

    ||D K - R||^2 + ||D Kp||^2 + tr(D A D^T)

is, with `G = [K Kp]` and `E` the first n columns of the identity of n + p,

    primal:  D = R K^T (A + G G^T)^-1                       a matrix [d, d] to factorise
    dual:    D = R E^T (I + G^T A^-1 G)^-1 G^T A^-1         one [n + p, n + p]

AlphaEdit (arXiv 2410.02355) is the same with A^-1 replaced by a projection onto the null space of
the second moment of keys, divided by its L2 weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_sleep.validation import check_choice, check_number

FILTERS = ("ridge", "null", "none")
# What counts as null, in mean eigenvalues. AlphaEdit's code has a number in keys' own units, which
# suits those of one size alone; on our small world much less of the mean leaves no room for facts.
NULL_THRESHOLD = 0.2


@dataclass(frozen=True)
class Spectrum:
    """A second moment of keys: `vectors diag(values) vectors^T + floor (I - vectors vectors^T)`.

    vectors: `[d, m]` orthonormal, values: `[m]`, both fp64; m < d where it comes from a sketch, and
    floor is then what the sketch left out, spread over the rest of the space.
    """

    vectors: Tensor
    values: Tensor
    floor: float = 0.0

    @classmethod
    def of(cls, moment: Tensor) -> Spectrum:
        """Of `moment: [d, d]`, symmetric; what rounding made negative counts as 0."""
        values, vectors = torch.linalg.eigh(moment.double())
        return cls(vectors, values.clamp(min=0))

    @property
    def mean(self) -> float:
        """The mean eigenvalue, over all d."""
        d, m = self.vectors.shape
        return (float(self.values.sum()) + self.floor * (d - m)) / d

    def gram(self, rows: Tensor) -> Tensor:
        """`X C X^T` in fp64, of `rows` X: `[n, d]`."""
        X = rows.to(self.vectors)
        inside = X @ self.vectors
        return (inside * (self.values - self.floor)) @ inside.T + self.floor * (X @ X.T)


class Preconditioner:
    """A^-1 as a function of the second moment of keys, and its symmetric square root.

    ridge: `1 / (weight s + ridge)` for each eigenvalue s: what many keys read is left alone, in
        proportion. ridge: `weight 1e-6` of the mean eigenvalue, so that A can be inverted.
    none: `1 / (weight mean)`: every direction alike.
    null: the same where s is below `NULL_THRESHOLD` of the mean, else 0: directions that many keys
        read are not touched at all.

    weight: of the preserved keys against one edited key, in tokens; > 0. Raises ValueError for
    another filter, a weight out of range, and a moment of zeros.
    """

    def __init__(self, spectrum: Spectrum, weight: float, kind: str = "ridge"):
        check_choice("filter", kind, FILTERS)
        check_number("weight", weight, above=0)
        mean = spectrum.mean
        if not (math.isfinite(mean) and mean > 0):
            raise ValueError(f"statistics must have keys that are finite and not zero, got {mean}")
        self.vectors = spectrum.vectors

        def inverse(values: Tensor) -> Tensor:
            if kind == "ridge":
                return 1 / (weight * values + 1e-6 * weight * mean)
            alike = torch.full_like(values, 1 / (weight * mean))
            return alike * (values < NULL_THRESHOLD * mean) if kind == "null" else alike

        rest = torch.tensor([spectrum.floor], dtype=torch.float64, device=spectrum.values.device)
        d, m = self.vectors.shape
        self.rest = 0.0 if m == d else float(inverse(rest)) ** 0.5
        self.roots = inverse(spectrum.values).sqrt()

    def root(self, X: Tensor) -> Tensor:
        """`A^-1/2 X`, X: `[d, n]` in fp64."""
        inside = self.vectors.T @ X
        scaled = self.vectors @ ((self.roots - self.rest)[:, None] * inside)
        return scaled + self.rest * X if self.rest else scaled


@dataclass(frozen=True)
class Solution:
    """An edit `D = left @ right`, left: `[o, m]`, right: `[m, d]`, m residuals, both fp64.

    error: `||D K - R|| / ||R||`; leak: `||D Kp|| / ||R||` (0 without past keys); condition: of the
    matrix that was factorised; norm: `||D||`, Frobenius.
    """

    left: Tensor
    right: Tensor
    error: float
    leak: float
    condition: float
    norm: float


def solve(
    keys: Tensor,
    residuals: Tensor,
    preconditioner: Preconditioner,
    past: Tensor | None = None,
    groups: Tensor | None = None,
) -> Solution:
    """The edit that gives `keys: [d, n]` the `residuals`, see the module's docstring.

    residuals: `[o, n]`, or `[o, m]` where `groups: [n]` says which of them each key is to get:
    keys of one fact in several contexts share one, so the rank of the edit is m.
    past: `[d, p]`, keys that are to keep their outputs.

    Computed in fp64 by Cholesky. Raises ValueError for shapes that do not fit and for numbers that
    are not finite, RuntimeError where the matrix cannot be factorised.
    """
    for name, X in (("keys", keys), ("residuals", residuals), ("past", past)):
        if X is not None and X.ndim != 2:
            raise ValueError(f"{name} must be a matrix, a column each, got shape {tuple(X.shape)}")
        if X is not None and not bool(torch.isfinite(X).all()):
            raise ValueError(f"{name} must be finite, got a NaN or an infinity")
    device = preconditioner.vectors.device
    K, R = keys.to(device, torch.float64), residuals.to(device, torch.float64)
    d, n = K.shape
    groups = torch.arange(n, device=device) if groups is None else groups.to(device)
    past = K.new_zeros(d, 0) if past is None else past.to(device, torch.float64)
    if groups.shape != (n,) or not bool(((groups >= 0) & (groups < R.shape[1])).all()):
        raise ValueError(
            f"residuals must be one for each of {n} keys, or have groups that say which is whose, "
            f"got {R.shape[1]} and groups of shape {tuple(groups.shape)}"
        )
    if not n or past.shape[0] != d or preconditioner.vectors.shape[0] != d:
        raise ValueError(
            f"keys must be one or more of the width of the statistics and of past keys, got "
            f"{tuple(K.shape)}, {preconditioner.vectors.shape[0]} and {past.shape[0]}"
        )
    Y = preconditioner.root(torch.cat((K, past), dim=1))
    S = Y.T @ Y
    S.diagonal().add_(1.0)
    factor, failed = torch.linalg.cholesky_ex(S)
    if int(failed):
        raise RuntimeError(
            f"the {len(S)} keys cannot be solved for together: their matrix is not positive "
            "definite in fp64"
        )
    member = torch.zeros(len(S), R.shape[1], dtype=torch.float64, device=device)
    member[torch.arange(n, device=device), groups] = 1.0
    right = preconditioner.root(Y @ torch.cholesky_solve(member, factor)).T
    wanted = R[:, groups]
    scale = max(float(wanted.norm()), torch.finfo(torch.float64).tiny)
    spread = torch.linalg.eigvalsh(S)
    return Solution(
        left=R,
        right=right,
        error=float((R @ (right @ K) - wanted).norm()) / scale,
        leak=float((R @ (right @ past)).norm()) / scale,
        condition=float(spread[-1] / spread[0]),
        norm=float(((R.T @ R) * (right @ right.T)).sum().clamp(min=0).sqrt()),
    )
