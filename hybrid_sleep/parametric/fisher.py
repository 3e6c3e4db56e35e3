"""How much each weight matters to what a model predicts: the diagonal of its Fisher information.

`F_i = E_x E_{y ~ p(.|x)} [(d log p(y|x) / d theta_i)^2]` (Kirkpatrick et al., arXiv 1612.00796; van
de Ven, "On the Computation of the Fisher Information in Continual Learning", 2025). Labels are
sampled from the model's own prediction. The scores of different positions, and of different rows,
are then independent with mean 0, so the square of their sum is an unbiased estimate of the sum of
their squares: one backward pass a batch suffices, of any size. With true labels it is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hybrid_sleep.parametric.durable import read_described, write_tensors
from hybrid_sleep.parametric.measure import right_padded
from hybrid_sleep.sleep.weights import weights_digest
from hybrid_sleep.support.io import unreadable
from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.training.ranks import add_over_ranks, ranks
from hybrid_sleep.validation import check_count

GATES = ("A_log", "dt_bias", "D")
# Positions whose distributions over the vocabulary are summed up at once, in fp64.
POSITIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Fisher:
    """The diagonal of a Fisher information, a sequence: by parameter name, fp32, of its shape.

    sequences, tokens: that it is of; tokens are the predicted ones. left_out: other parameters, and
    why. model: digest of the weights that it is of.
    """

    values: dict[str, Tensor]
    sequences: int
    tokens: int
    left_out: dict[str, str]
    model: str

    @property
    def mean(self) -> float:
        """Over all entries of all parameters."""
        return mean_of(self.values)

    def normalised(self) -> Fisher:
        """The same with mean 1 over all entries, so that a strength has the same effect on every
        loss (arXiv 1805.06370). Raises ValueError where all entries are 0.
        """
        return replace(self, values=with_mean_1(self.values))

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless this is of `model` with the weights that it has now."""
        digest = weights_digest(model)
        if digest != self.model:
            raise ValueError(
                "model must have the weights that the Fisher information is of, of digest "
                f"{self.model[:12]}, got {digest[:12]}"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write to the file `path` (safetensors), atomically."""
        about = {name: getattr(self, name) for name in _ABOUT}
        write_tensors(Path(path), self.values, about)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Fisher:
        """What `save` wrote; OSError or ValueError naming a file that is missing or damaged."""
        values, about = read_described(path)
        try:
            return cls(values, **{name: about[name] for name in _ABOUT})
        except KeyError as error:
            raise unreadable(path, f"it is no Fisher information, {error} is missing") from error


_ABOUT = ("sequences", "tokens", "left_out", "model")


def mean_of(values: Mapping[str, Tensor]) -> float:
    """The mean over all entries of all tensors."""
    total = sum(float(x.double().sum()) for x in values.values())
    return total / sum(x.numel() for x in values.values())


def with_mean_1(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`values` >= 0 over the mean of all entries; ValueError where that is 0."""
    mean = mean_of(values)
    if not mean > 0:
        raise ValueError("values must not all be 0, got a measure of importance without any")
    return {name: x / mean for name, x in values.items()}


def left_out(model: nn.Module) -> dict[str, str]:
    """Parameters that no Fisher information is taken of unless asked for, by name, and why.

    Those whose few entries everything passes through, so that theirs would dwarf all others: gates
    (`A_log`, `dt_bias`, `D`), convolutions, gains of norms; and embeddings, a row of which few
    tokens tell of. What is left out is not held: freeze it, or let it drift.
    """
    found = {}
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    for prefix, module in model.named_modules():
        for own in module._parameters:
            name = f"{prefix}.{own}".removeprefix(".")
            if own in GATES:
                found[name] = "gate"
            elif isinstance(module, _ConvNd) or "conv" in own:
                found[name] = "convolution"
            elif "norm" in type(module).__name__.lower():
                found[name] = "norm"
            elif isinstance(module, nn.Embedding) or module is inputs:
                found[name] = "embedding"
    return found


def check_whole(model: nn.Module) -> None:
    """Raise ValueError under ZeRO-3, where no process has a parameter whole."""
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id"):
            raise ValueError(
                f"model must be whole in every process, but ZeRO-3 has partitioned {name!r}; "
                "ZeRO stages 0 to 2 leave it whole"
            )


def covered(
    model: nn.Module, left_out: Callable[[nn.Module], Mapping[str, str]] = left_out
) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """The trainable parameters of `model` that are not `left_out(model)`, and why not the others.

    One that has several names counts once, and is left out if one of them is. Raises ValueError if
    none is covered, and under ZeRO-3 (see `check_whole`).
    """
    check_whole(model)
    reasons = dict(left_out(model))
    unknown = reasons.keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if unknown:
        raise ValueError(f"left_out must give names of parameters, got {min(unknown)!r}")
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    chosen, others = {}, {}
    for name, p in model.named_parameters():
        first, *ties = names[id(p)]
        why = next((reasons[n] for n in names[id(p)] if n in reasons), None)
        if not p.requires_grad:
            others[name] = "frozen"
        elif why is not None:
            others[name] = why
        else:
            chosen[name] = p
        others |= dict.fromkeys(ties, f"tied to {first}")
    if not chosen:
        raise ValueError(
            "model must have a trainable parameter that is not left out, got none; they are "
            + ", ".join(sorted(set(others.values())))
        )
    return chosen, others


def estimate_fisher(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    targets: Sequence[Sequence[bool]] | None = None,
    batch: int = 8,
    seed: int = 0,
    sleep_passes: Any = None,
    left_out: Callable[[nn.Module], Mapping[str, str]] = left_out,
    progress: Callable[[int, int], None] | None = None,
) -> Fisher:
    """The Fisher information of `model` on `rows` of ids, with sampled labels.

    Args:
        targets: of every row, which of its tokens are predicted; a row's first never is. None: all
            others. Rows without any do not count.
        batch: rows of one backward pass, over all processes together; only the variance of the
            estimate depends on it, not its mean. With 1 it is the mean of squares of single rows.
        seed: labels are drawn from (seed, index of the row), so which process has a row, or what
            it shares a batch with, changes none of them.
        sleep_passes: a depth for the forward passes of a model that sleeps; None: its own.
        left_out: which parameters not to cover, by name, and why (see `left_out`).
        progress: told how many rows are done, and of how many.

    In several processes, all with the same arguments, each has its share of every batch; gradients
    are summed over them before they are squared, so that the result is that of one process. Squares
    are summed in fp32. The model is in eval mode meanwhile, in no `DistributedDataParallel`; modes,
    gradients and the global random state stay as they were.

    Raises ValueError, before anything is computed, for arguments that do not fit and a model of
    ZeRO-3, and for gradients that are not finite.
    """
    check_count("batch", batch)
    check_count("seed", seed, minimum=0)
    wanted = [_targets(i, row, targets) for i, row in enumerate(rows)]
    if targets is not None and len(targets) != len(rows):
        raise ValueError(f"targets must be of all {len(rows)} rows, got {len(targets)}")
    # Rows of like lengths together: pads cost as much as tokens.
    order = sorted((i for i, row in enumerate(wanted) if any(row)), key=lambda i: -len(rows[i]))
    if not order:
        raise ValueError("rows must hold a predicted token behind another, got none")
    chosen, others = covered(model, left_out)
    values = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in chosen.items()}
    options = {} if sleep_passes is None else {"sleep_passes": sleep_passes}
    processes = ranks()
    own = torch.distributed.get_rank() if processes > 1 else 0
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for module, training in modes.items():
            stack.callback(setattr, module, "training", training)
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.enable_grad())
        model.eval()
        for first in range(0, len(order), batch):
            members = order[first : first + batch]
            mine = members[own::processes]
            scores: Sequence[Tensor | None] = [None] * len(chosen)
            if mine:
                ids, mask = right_padded([rows[i] for i in mine], device)
                out = model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
                log_likelihood = sum(
                    _log_likelihood(logits, wanted[i], derive_seed("labels", seed, i))
                    for i, logits in zip(mine, out.logits, strict=True)
                )
                assert isinstance(log_likelihood, Tensor)
                # Unlike `backward` it leaves every `.grad` alone.
                scores = torch.autograd.grad(
                    log_likelihood, list(chosen.values()), allow_unused=True
                )
            for total, score in zip(values.values(), scores, strict=True):
                # Half precision would overflow when squared.
                score = torch.zeros_like(total) if score is None else score.float()
                score = add_over_ranks(score.contiguous())
                total.addcmul_(score, score)
            if progress is not None:
                progress(first + len(members), len(order))
    for name, total in values.items():
        total.div_(len(order))
        if not bool(torch.isfinite(total).all()):
            raise ValueError(
                f"model must have finite gradients, got others for {name!r}; float16 overflows, "
                "bfloat16 and float32 do not"
            )
    tokens = sum(map(sum, wanted))
    return Fisher(values, len(order), tokens, others, weights_digest(model))


def _targets(
    index: int, row: Sequence[int], targets: Sequence[Sequence[bool]] | None
) -> list[bool]:
    """Which tokens of `row` behind its first are predicted."""
    if targets is None or index >= len(targets):
        return [True] * (len(row) - 1)
    if len(targets[index]) != len(row):
        raise ValueError(
            f"targets[{index}] must say it of all {len(row)} tokens of its row, got "
            f"{len(targets[index])}"
        )
    return [bool(x) for x in targets[index][1:]]


def _log_likelihood(logits: Tensor, wanted: Sequence[bool], seed: int) -> Tensor:
    """Of labels that `logits: [T, V]` itself predicts, summed over the wanted positions."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(wanted), generator=generator, dtype=torch.float64)
    # What the last token of a row predicts, and what comes behind it, is no target.
    positions = torch.tensor(wanted).nonzero()[:, 0]
    logits = logits[positions.to(logits.device)]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = sample(logits.detach(), uniform[positions].to(logits.device))
    return -nn.functional.cross_entropy(logits, labels, reduction="sum")


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Labels `[T]` of the distributions `logits: [T, V]`, at temperature 1, with no filter.

    uniform: `[T]`, in [0, 1); a label is where the cumulative probability first exceeds it.
    """
    labels = []
    for part, u in zip(
        logits.split(POSITIONS_AT_ONCE), uniform.split(POSITIONS_AT_ONCE), strict=True
    ):
        cumulative = part.double().softmax(-1).cumsum(-1)
        scaled = (u[:, None] * cumulative[:, -1:]).contiguous()
        labels.append(torch.searchsorted(cumulative, scaled, right=True)[:, 0])
    return torch.cat(labels).clamp_(max=logits.shape[-1] - 1)
