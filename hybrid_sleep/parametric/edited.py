"""Edited weights: those before any edit plus low-rank factors, put together once a commit.

Before any edit they are the pristine ones, or what was trained of them in a sleep over experience.
Nothing is ever subtracted: the weights of a commit are computed from those and its list of factors,
in fp64, and rounded once. So an undo, and a restart, give the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.factors import Factors
from hybrid_sleep.parametric.sites import Site, find_sites, side_branch
from hybrid_sleep.sleep.weights import bump_version, gathered, tensors_digest, weights_digest

ROWS_AT_ONCE = 1024


class EditedWeights:
    """The weights of a model's sites, of which the pristine ones are kept.

    learned: those that were trained since, in the place of pristine ones, by parameter name.
    materialised: the factors that are in the weights, or beside them, now.
    pristine: by parameter name, where the model comes with edits already (see `check`); sites that
    are edited later are copied from the model. A quantised site keeps its factors as a side branch,
    which no `save_pretrained` writes.
    """

    def __init__(self, model: nn.Module, pristine: Mapping[str, Tensor] | None = None):
        self.model = model
        self.sites = {site.name: site for site in find_sites(model)}
        self.pristine = dict(pristine or {})
        self.learned: dict[str, Tensor] = {}
        self.materialised: list[Mapping[str, Factors]] = []
        self._branches: dict[str, Any] = {}
        self.base = self._pristine_digest()

    def _pristine_digest(self) -> str:
        """Digest of all weights, with the pristine ones where those are known."""
        parameters = dict(self.model.named_parameters())
        for name, kept in self.pristine.items():
            p = parameters.get(name)
            shape = None if p is None else tuple(getattr(p, "ds_shape", p.shape))
            if p is None or (p.dtype, shape) != (kept.dtype, tuple(kept.shape)):
                raise ValueError(
                    f"model must have the weights that were edited, {name!r} as {kept.dtype} of "
                    f"shape {tuple(kept.shape)}, got "
                    f"{'none' if p is None else f'{p.dtype} of shape {shape}'}"
                )
        # A pristine model needs no second look: its digest is cached by its version.
        if not self.pristine:
            return weights_digest(self.model)
        return weights_digest(self.model, instead=self.pristine)

    def keep(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Copy the pristine weights of `sites` that are not kept yet; returns those that are new.

        For sites that no factors were ever added to.
        """
        return self.keep_parameters([site.parameter for site in sites if site.dense])

    def keep_parameters(self, names: Collection[str]) -> dict[str, Tensor]:
        """The same for parameters that are to be trained."""
        parameters = dict(self.model.named_parameters())
        new = {}
        for name in names:
            if name not in self.pristine:
                with gathered([parameters[name]]):
                    new[name] = parameters[name].detach().cpu().clone()
        self.pristine.update(new)
        return new

    def learn(self, weights: Mapping[str, Tensor]) -> None:
        """Take `weights` for those before any edit, and pristine ones for all others, from the next
        `materialise` on. Raises ValueError for one whose pristine weights are not kept, or of
        another shape or dtype than those."""
        for name, new in weights.items():
            kept = self.pristine.get(name)
            if kept is None or (kept.dtype, kept.shape) != (new.dtype, new.shape):
                raise ValueError(
                    f"weights must be of parameters whose pristine weights are kept, and like "
                    f"them, got {name!r} as {new.dtype} of shape {tuple(new.shape)}"
                )
        self.learned = dict(weights)

    def digest(self) -> str:
        """A digest of the weights as they are now; that of the pristine ones where none differs."""
        now: dict[str, Tensor] = {}
        parameters = dict(self.model.named_parameters())
        for name, kept in self.pristine.items():
            with gathered([parameters[name]]):
                current = parameters[name].detach().cpu()
                if not _same_bits(current, kept):
                    now[name] = current.clone()
        for name, part in self._branches.items():
            now |= {f"{name}.left": part.left, f"{name}.right": part.right}
        return self._digest(now)

    def unedited(self) -> str:
        """The digest of the weights before any edit."""
        return self._digest(
            {n: x for n, x in self.learned.items() if not _same_bits(x, self.pristine[n])}
        )

    def _digest(self, other: Mapping[str, Tensor]) -> str:
        if not other:
            return self.base
        return hashlib.sha256(f"{self.base}:{tensors_digest(other)}".encode()).hexdigest()

    def change(self) -> dict[str, float]:
        """By site, the norm of what was added, in norms of the pristine weight."""
        parameters = dict(self.model.named_parameters())
        found = {}
        for name, kept in self.pristine.items():
            with gathered([parameters[name]]):
                step = parameters[name].detach().cpu().double() - kept.double()
            found[name.removesuffix(".weight")] = float(step.norm() / kept.double().norm())
        return found

    def materialise(self, factors: Sequence[Mapping[str, Factors]]) -> bool:
        """Make the weights those before any edit plus all of `factors`, by site name; whether any
        bit changed.

        Bumps the weights version if so, and touches nothing otherwise. Raises ValueError, before
        anything changes, for a site that the model lacks, one whose pristine weights are not kept,
        and factors of other shapes.
        """
        by_site: dict[str, list[Factors]] = {}
        for commit in factors:
            for name, part in commit.items():
                by_site.setdefault(name, []).append(part)
        for name, parts in by_site.items():
            self._check(name, parts)
            # Adding nothing would still turn -0 into 0.
            by_site[name] = [part for part in parts if part.left.shape[1]]
        parameters = dict(self.model.named_parameters())
        changed = False
        kept = {site.parameter: site for site in self.sites.values()}
        for parameter, pristine in self.pristine.items():
            p, site = parameters[parameter], kept.get(parameter)
            parts = by_site.get(site.name, []) if site else []
            before = self.learned.get(parameter, pristine)
            with gathered([p], write=True), torch.no_grad():
                if not p.numel():
                    continue
                new = _put_together(before, parts, bool(site and site.transposed)).to(p.device)
                if not _same_bits(new, p.detach()):
                    p.copy_(new)
                    changed = True
        for site in self.sites.values():
            if not site.dense:
                changed |= self._branch(site, by_site.get(site.name, []))
        if changed:
            bump_version(self.model)
        self.materialised = list(factors)
        return changed

    def _check(self, name: str, parts: Sequence[Factors]) -> None:
        site = self.sites.get(name)
        if site is None:
            raise ValueError(f"factors must be of a site of the model, got {name!r}")
        if site.dense and site.parameter not in self.pristine:
            raise ValueError(f"factors must be of a site whose pristine weights are kept: {name!r}")
        for part in parts:
            shape = part.left.shape[0], part.right.shape[1]
            if shape != (site.outputs, site.inputs):
                raise ValueError(
                    f"factors of {name} must make {site.outputs} x {site.inputs}, got "
                    f"{shape[0]} x {shape[1]}"
                )

    def _branch(self, site: Site, parts: Sequence[Factors]) -> bool:
        """Put `parts` beside the quantised `site`; whether anything changed."""
        held = self._branches.pop(site.name, None)
        if held is not None:
            held.handle.remove()
        if parts:
            new = side_branch(self.model, site, parts)
            self._branches[site.name] = new
            return held is None or not (
                _same_bits(held.left, new.left) and _same_bits(held.right, new.right)
            )
        return held is not None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # -0 equals 0 and NaN nothing, not even itself.
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _put_together(before: Tensor, parts: Sequence[Factors], transposed: bool) -> Tensor:
    """`before + sum of left @ right`, in fp64, some rows at a time, rounded to its dtype."""
    if not parts:
        return before
    left = torch.cat([part.left for part in parts], dim=1).double()
    right = torch.cat([part.right for part in parts]).double()
    if transposed:
        left, right = right.T, left.T
    new = torch.empty_like(before)
    for first in range(0, len(before), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        new[rows] = (before[rows].double() + left[rows] @ right).to(before.dtype)
    return new
