"""Small models, and rows that know which windows the specification cuts them into."""

from __future__ import annotations

from typing import Any

import torch

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM, SleepCache
from hybrid_sleep.sleep.minimal import MinimalModel, Window
from hybrid_sleep.sleep.minimal import Row as Read
from hybrid_sleep.sleep.state import LayerState

VOCAB = 11

# The smallest model section of a run config that learns anything.
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def small_config(**changes: Any) -> HybridSleepConfig:
    """Four layers, window 5, every shape different from every other."""
    kinds = changes.pop("layer_types", ["full_attention", "linear_attention"] * 2)
    return HybridSleepConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 12,
            "intermediate_size": 10,
            "num_hidden_layers": len(kinds),
            "layer_types": kinds,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 6,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 3,
            "window": 5,
            **changes,
        }
    )


def small_model(
    config: HybridSleepConfig | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    noise: float = 0.2,
    seed: int = 0,
    **changes: Any,
) -> HybridSleepForCausalLM:
    """A model whose norms, gates and skips are all away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HybridSleepForCausalLM(config or small_config(**changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            shift = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * shift.to(parameter.dtype))
    return model


def small_ids(*shape: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def oracle_of(model: HybridSleepForCausalLM, dtype: torch.dtype = torch.float64) -> MinimalModel:
    """The specification with the model's weights."""
    weights = {name: value.detach().to(dtype) for name, value in model.state_dict().items()}
    return MinimalModel(model.config, weights)


class Row:
    """The history of one row: which windows its tokens fell into and how deep each sleep was."""

    def __init__(self, window: int):
        self.window = window
        self.windows = [Window()]

    def read(self, tokens: Any, depth: int) -> Row:
        """Tokens of one call; where one finds its window full, the row sleeps first."""
        for token in tokens:
            if len(self.windows[-1].tokens) == self.window:
                self.sleep(depth)
            self.windows[-1].tokens.append(token)
        return self

    def sleep(self, depth: int) -> Row:
        """Close the window if it holds anything."""
        if self.windows[-1].tokens:
            self.windows[-1].depth = depth
            self.windows.append(Window())
        return self

    @property
    def count(self) -> int:
        """Tokens in the open window."""
        return len(self.windows[-1].tokens)

    @property
    def sleeps(self) -> int:
        return len(self.windows) - 1

    @property
    def total(self) -> int:
        return sum(len(window.tokens) for window in self.windows)


def expect(model: HybridSleepForCausalLM, ids: torch.Tensor, depth: int) -> Read:
    """What the specification says about one row read in one go."""
    return oracle_of(model).read(Row(model.config.window).read(ids.tolist(), depth).windows)


def snapshot(cache: SleepCache) -> dict[str, Any]:
    """Copies of everything a cache holds, by name."""
    held: dict[str, Any] = {"columns": cache.columns, "reports": len(cache.reports)}
    held["whole"], held["opening"] = (x.clone() for x in cache.history.folded()[:2])
    for name in ("counts", "kept", "positions", "sleeps", "supervised", "hidden"):
        value = getattr(cache, name)
        held[name] = None if value is None else value.clone()
    for kind in ("states", "opening"):
        for i, state in getattr(cache, kind).items():
            for name, value in fields_of(state).items():
                held[f"{kind}.{i}.{name}"] = value.clone()
    return held


def fields_of(state: LayerState) -> dict[str, torch.Tensor]:
    """The tensors of a layer's state by name."""
    S = {} if state.S is None else {"S": state.S}
    tails = {f"tails.{i}": x for i, x in enumerate(state.tails) if x is not None}
    return S | tails | {f"slots.{i}": x for i, x in enumerate(state.slots)}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Equal names and values, bit for bit (a NaN equals itself)."""
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and isinstance(after[name], torch.Tensor):
            assert value.shape == after[name].shape, name
            same = (value == after[name]) | (value.isnan() & after[name].isnan())
            assert same.all(), name
        else:
            assert value == after[name], name


def gap(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest wanted value where that is above 1."""
    actual, wanted = actual.detach().double(), wanted.detach().double()
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    return (actual - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
