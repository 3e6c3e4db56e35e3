"""Where a weight edit goes: the linear layer of a block that writes into the residual stream.

An MLP's last projection is an associative memory, its input the key and its output the value
(Geva et al., arXiv 2012.14913; Meng et al., arXiv 2202.05262). In blocks without an MLP, such as
those of a pure Mamba-2, it is the mixer's output projection (Sharma et al., arXiv 2404.03646).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hybrid_sleep.parametric.factors import Factors

# By preference; names as in llama, qwen, mistral, gemma and ours; gpt2; gpt_neox, falcon; opt;
# gptj, phi; mamba; ours without MLP.
WRITERS = (
    "mlp.down_proj",
    "mlp.c_proj",
    "mlp.dense_4h_to_h",
    "fc2",
    "mlp.fc2",
    "mlp.fc_out",
    "mixer.out_proj",
    "mixer.o_proj",
)
DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Site:
    """A linear layer that can hold edits.

    layer: index of its block. name: of the module, as in `model.named_modules()`. inputs,
    outputs: d and o. transposed: its weight is `[d, o]`, as in GPT-2. dense: it has a floating
    point weight to edit; False for a quantised one, beside which edits stay as factors.
    """

    layer: int
    name: str
    inputs: int = field(compare=False)
    outputs: int = field(compare=False)
    transposed: bool = field(default=False, compare=False)
    dense: bool = field(default=True, compare=False)

    @property
    def parameter(self) -> str:
        """Name of its weight."""
        return f"{self.name}.weight"


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks of a causal model, and its name: the one with the most parameters."""
    lists = [
        (name, m)
        for name, m in model.named_modules()
        # What passes of a sleep have of their own does not predict.
        if isinstance(m, nn.ModuleList) and "later_layers" not in name.split(".")
    ]
    if not lists:
        raise ValueError(f"model must have its blocks in a ModuleList, got {type(model).__name__}")

    def size(stack: nn.ModuleList) -> int:
        # A parameter that DeepSpeed has partitioned is empty, and knows its size by another name.
        return sum(getattr(p, "ds_numel", p.numel()) for p in stack.parameters())

    return max(lists, key=lambda pair: size(pair[1]))


def hidden(out: Any) -> Tensor:
    """The hidden states of what a block gives, which may be a tuple with its state behind them."""
    return out[0] if isinstance(out, tuple) else out


def find_sites(model: nn.Module) -> list[Site]:
    """The sites of `model`, at most one a block; ValueError if no block has one."""
    prefix, stack = blocks(model)
    found = []
    for layer, block in enumerate(stack):
        inside = dict(block.named_modules())
        writer = next((name for name in WRITERS if _shape(inside.get(name)) is not None), None)
        if writer is not None:
            outputs, inputs, transposed, dense = _shape(inside[writer])
            name = f"{prefix}.{layer}.{writer}"
            found.append(Site(layer, name, inputs, outputs, transposed, dense))
    if not found:
        raise ValueError(
            f"model must have blocks with one of {', '.join(WRITERS)} to hold an edit, got "
            f"{type(model).__name__}"
        )
    return found


def _shape(module: nn.Module | None) -> Any:
    """(o, d, transposed, dense) of a linear layer, None for anything else."""
    if module is None:
        return None
    if isinstance(module, Conv1D):
        return module.nf, module.nx, True, True
    if isinstance(module, nn.Linear) or hasattr(module, "in_features"):
        # Not what a wrapper shows as its weight. One of 8 bits is a quantised one, floating or not.
        weight = module._parameters.get("weight")
        dense = weight is not None and weight.dtype in DENSE
        return module.out_features, module.in_features, False, dense
    return None


def site_at(model: nn.Module, layer: int) -> Site:
    """The site of block `layer`; ValueError naming those that have one."""
    sites = {site.layer: site for site in find_sites(model)}
    if layer not in sites:
        raise ValueError(f"layer must be one with a site, {sorted(sites)}, got {layer!r}")
    return sites[layer]


@contextmanager
def capture(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, list[Tensor]]]:
    """The inputs `[B, T, d]` of each site, in a list with one for each time it was applied.

    `[B T, d]` of a model that flattens them, such as OPT.
    A block that is shared, or applied again in a sleep, gives one for every pass.
    """
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def watch(site: Site) -> Any:
        return lambda module, given: seen[site].append(given[0].detach())

    with ExitStack() as hooks:
        for site in sites:
            handle = model.get_submodule(site.name).register_forward_pre_hook(watch(site))
            hooks.callback(handle.remove)
        yield seen


class _Enough(Exception):
    """Raised in the middle of a forward pass of which the rest is not needed."""


@contextmanager
def ending(model: nn.Module, layer: int) -> Iterator[Callable[..., None]]:
    """A function that runs `model` as far as block `layer`; nothing above it is computed.

    Its first run goes to the end, as no other shows how often a shared block is applied: it must be
    one in which it is applied as often as in any other, for a sleeping model of the longest rows.
    So does every run where ZeRO-3 gathers weights in turn, which an end in the middle would upset.
    Hooks that are to see the block's last output must be there before.
    """
    applied, count = 0, 0
    in_turn = any(hasattr(p, "ds_id") for p in model.parameters())

    def reached(module: nn.Module, given: Any, out: Any) -> None:
        nonlocal count
        count += 1
        if count == applied:
            raise _Enough

    def run(**inputs: Any) -> None:
        nonlocal applied, count
        count = 0
        with suppress(_Enough):
            model(**inputs, use_cache=False, logits_to_keep=1)
        applied = applied or (0 if in_turn else count)

    handle = blocks(model)[1][layer].register_forward_hook(reached)
    try:
        yield run
    finally:
        handle.remove()


@dataclass(frozen=True)
class SideBranch:
    """Factors beside a linear layer, `y + left (right x)`; `handle.remove()` takes them away."""

    left: Tensor
    right: Tensor
    handle: Any


def side_branch(model: nn.Module, site: Site, parts: Sequence[Factors]) -> SideBranch:
    """Add `left @ right` of all `parts` to what `site` computes; its weights are not touched."""
    left = torch.cat([part.left for part in parts], dim=1)
    right = torch.cat([part.right for part in parts])

    def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = nn.functional.linear(given[0].to(right.dtype), right.to(out.device))
        return out + nn.functional.linear(x, left.to(out.device)).to(out.dtype)

    handle = model.get_submodule(site.name).register_forward_hook(add)
    return SideBranch(left, right, handle)


@contextmanager
def added(model: nn.Module, factors: Mapping[Site, Factors]) -> Iterator[None]:
    """`model` as if `left @ right` were added to the weights of the sites; they are not touched."""
    with ExitStack() as branches:
        for site, part in factors.items():
            branches.callback(side_branch(model, site, [part]).handle.remove)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode with no parameter that asks for a gradient; all back afterwards."""
    modes = {module: module.training for module in model.modules()}
    asking = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
