"""What one more token costs: decoding in place and compiled, beside transformers' own hybrids.

All have the same dims, random weights, and a batch of rows of the same length. They take a few
tokens each in turn, so that each meets the same machine, and are compared token by token. (With one
token each in turn none would find its weights in the processor's cache, as one that runs alone
does.) Nothing is sampled: a token is a forward pass and the argmax of its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from hybrid_sleep.eval.costs.call import Call
from hybrid_sleep.eval.costs.models import untrained
from hybrid_sleep.eval.costs.timing import Spread, stopwatch
from hybrid_sleep.eval.results import Result
from hybrid_sleep.validation import check_count

REFERENCE = "hybrid_sleep, compiled"
OPENING = 8  # tokens of the window that are read before any is timed
TURN = 8  # tokens that a model takes before the next one has its turn
VOCABULARY = 4096


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one model: seconds of a token, of its share of the reference's, token by token; of the
    prompt, and of the first tokens after it, in which what is compiled is compiled; bytes held;
    how it runs, or why it does not (then all else is None)."""

    path: str
    token: Spread | None = None
    ratio: Spread | None = None
    prompt_seconds: float | None = None
    first_seconds: float | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class DecodingRow:
    """A batch of `batch` rows behind `windows` full windows; the cost of each model by name."""

    batch: int
    windows: int
    costs: dict[str, Cost]

    def times_as_fast(self, name: str) -> float | None:
        """How many times as fast the reference is as `name`: the median over tokens."""
        cost = self.costs[name]
        return None if cost.ratio is None else cost.ratio.median


@dataclass(kw_only=True)
class DecodingCost(Result):
    """One token more, by batch and past, of models of one config."""

    benchmark: ClassVar[str] = "decoding"
    repeats: int
    hidden: int
    layers: int
    window: int
    passes: int
    parameters: dict[str, int]
    rows: list[DecodingRow]


class Runner:
    """A model with a cache, which takes one token a row at a time; call: what is called for it."""

    def __init__(self, model: Any, cache: Any, call: Callable[..., Any]):
        self.model, self.cache, self._call = model, cache, call
        self.tokens = torch.zeros(0)

    def read(self, ids: torch.Tensor) -> None:
        """The prompt, after which `tokens` are those to go on with."""
        self._take(self.model, ids)

    def step(self) -> None:
        """One token a row."""
        self._take(self._call, self.tokens)

    def _take(self, call: Callable[..., Any], ids: torch.Tensor) -> None:
        out = call(ids, use_cache=True, logits_to_keep=1, cache=self.cache)
        self.tokens = out.logits[:, -1:].argmax(-1)

    @property
    def path(self) -> str:
        """How the last token was taken."""
        return getattr(self.cache, "decoding", "a forward pass of transformers")


def run(
    call: Call,
    *,
    batches: Sequence[int] = (1, 8),
    windows: Sequence[int] = (0, 64),
    hidden: int = 256,
    layers: int = 8,
    window: int = 128,
    passes: int = 2,
) -> DecodingCost:
    """Time `call.repeats` tokens of each model, for every batch and number of past windows.

    Raises ValueError for counts below 1, and a window that has no room for so many tokens.
    """
    for name, value in (("hidden", hidden), ("layers", layers), ("passes", passes)):
        check_count(name, value)
    for batch in batches:
        check_count("batches", batch)
    for past in windows:
        check_count("windows", past, 0)
    check_count("window", window, OPENING + call.repeats + 4)
    models = {
        "hybrid_sleep": untrained(
            "gated_deltanet", hidden=hidden, layers=layers, window=window, head_dim=64,
            vocabulary=VOCABULARY, device=call.device,
        ),
        **peers(hidden, layers, call.device),
    }  # fmt: skip

    def measure(key: dict[str, Any]) -> dict[str, Any]:
        ids = torch.randint(
            VOCABULARY, (key["batch"], key["windows"] * window + OPENING),
            generator=torch.Generator().manual_seed(0),
        ).to(call.device)  # fmt: skip
        return {"costs": compare(models, ids, call.repeats, passes, stopwatch(call.device))}

    planned = [{"batch": batch, "windows": past} for past in windows for batch in batches]
    return call.measure(
        DecodingCost, planned, measure, hidden=hidden, layers=layers, window=window, passes=passes,
        parameters={name: sum(p.numel() for p in m.parameters()) for name, m in models.items()},
    )  # fmt: skip


def peers(hidden: int, layers: int, device: Any) -> dict[str, Any]:
    """transformers' hybrids of Gated DeltaNet and attention in these dims, by model type."""
    from transformers.models.olmo_hybrid import OlmoHybridConfig, OlmoHybridForCausalLM
    from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM

    heads = max(1, hidden // 64)
    dims: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        layer_types=[("full_attention", "linear_attention")[i % 2] for i in range(layers)],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=1 << 20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    dense: dict[str, Any] = dict(head_dim=64, num_experts=0, mlp_only_layers=[*range(layers)])
    torch.manual_seed(0)
    made = {
        "olmo_hybrid": OlmoHybridForCausalLM(OlmoHybridConfig(**dims)),
        "qwen3_next": Qwen3NextForCausalLM(Qwen3NextConfig(**dims, **dense)),
    }
    return {name: model.to(device).eval() for name, model in made.items()}


@torch.no_grad()
def compare(
    models: dict[str, Any], ids: torch.Tensor, tokens: int, passes: int, now: Callable[[], float]
) -> dict[str, Any]:
    """The `Cost` of each model in its variants, as plain data, `tokens` tokens behind `ids`."""
    runners: dict[str, Runner] = {}
    costs: dict[str, dict[str, Any]] = {}
    for name, make in variants(models, passes).items():
        began = now()
        try:
            runner = make()
            runner.read(ids)
            prompt, began = now() - began, now()
            for _ in range(3):
                runner.step()
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            costs[name] = {"path": f"does not run: {why}"}
            continue
        runners[name] = runner
        costs[name] = {"prompt_seconds": prompt, "first_seconds": now() - began}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    for turn, done in enumerate(range(0, tokens, TURN)):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(min(TURN, tokens - done)):
                began = now()
                runners[name].step()
                seconds[name].append(now() - began)
    for name, runner in runners.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds[REFERENCE], strict=True)]
        costs[name] |= {
            "path": runner.path,
            "token": vars(Spread.of(seconds[name])),
            "ratio": vars(Spread.of(ratios)),
            "cache_bytes": sum(x.nbytes for x in held(runner.cache)),
        }
    return costs


def variants(models: dict[str, Any], passes: int) -> dict[str, Callable[[], Runner]]:
    """What is timed, by name."""
    from transformers import DynamicCache

    from hybrid_sleep import SleepCache

    def ours(model: Any, compiled: bool) -> Runner:
        model.config.sleep_passes = passes
        cache = SleepCache(model.config)
        cache.compile = compiled
        return Runner(model, cache, model)

    def theirs(model: Any, compiled: bool) -> Runner:
        cache = DynamicCache(config=model.config)
        return Runner(model, cache, torch.compile(model) if compiled else model)

    found: dict[str, Callable[[], Runner]] = {}
    for name, model in models.items():
        make = ours if name == "hybrid_sleep" else theirs
        found[f"{name}, compiled"] = partial(make, model, True)
        found[name] = partial(make, model, False)
    return found


def held(tree: Any) -> list[torch.Tensor]:
    """All tensors of a cache, ours or of transformers."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if hasattr(tree, "tensors"):
        return tree.tensors()
    if isinstance(tree, dict):
        return [x for part in tree.values() for x in held(part)]
    if isinstance(tree, (list, tuple)):
        return [x for part in tree for x in held(part)]
    if hasattr(tree, "layers"):
        return [x for layer in tree.layers for x in held(vars(layer))]
    return []
