"""SleepOptions: when and how a model sleeps, as a value that no model class owns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from hybrid_sleep.validation import check_choice, check_count

Passes = int | Literal["auto"]
# Of a batch in K groups of equally many rows, one below the other: a depth for each.
Depths = Passes | tuple[int, ...]
TOLERANCE = 1e-2
MAX_PASSES = 16

EVICTIONS = ("hard", "sliding")
SCHEDULES = ("context_windows", "every_window")
ATTENTIONS = ("causal", "bidirectional")
CARRIES = ("both", "hidden_states", "fast_weights")

@dataclass(frozen=True)
class SleepOptions:
    """What a window is, and what a sleep does to it.

    window: L, tokens that attention sees at a time, at least 1.
    loop: `(start, end)`, blocks that a sleep repeats; those before run once, those behind (the
        coda) once more on the last pass.
    passes: default depth N, at least 1; a call may choose another.
    eviction: `hard` keeps only fast weights across a boundary; `sliding` also the last L - 1
        tokens' keys and values, and the convolution tails.
    schedule: with labels, `context_windows` (Algorithm 1) lets only windows without a supervised
        token sleep, `every_window` every full one, after it has predicted.
    attention: in passes 2..N, which predict nothing, `causal` or `bidirectional` in the window.
    carry: what a pass takes over from the one before it, `both` hidden states h and fast weights S
        (Algorithm 1), or one of them, the other as it was before pass 1. With `hidden_states` each
        pass starts from the S that the window opened with, so that a window is written once; with
        `fast_weights` each reads what enters the loop, as if the window were written N times.
    distinct_passes: how many passes have looped blocks of their own, at least 1; later ones take
        those of the last. At 1 a sleep repeats the blocks that predict.

    Raises ValueError naming the field, its value and what is allowed.
    """

    window: int
    loop: tuple[int, int]
    passes: int = 1
    eviction: Literal["hard", "sliding"] = "hard"
    schedule: Literal["context_windows", "every_window"] = "context_windows"
    attention: Literal["causal", "bidirectional"] = "causal"
    carry: Literal["both", "hidden_states", "fast_weights"] = "both"
    distinct_passes: int = 1

    def __post_init__(self) -> None:
        check_loop(self.loop)
        check_sleep(
            self.window,
            self.passes,
            self.eviction,
            self.schedule,
            self.attention,
            self.carry,
            self.distinct_passes,
            prefix="",
        )

    @property
    def is_sliding(self) -> bool:
        """Whether keys, values and tails cross a boundary."""
        return self.eviction == "sliding"

    @property
    def start_of_passes(self) -> int:
        """The block in front of which the hidden states stand that pass 2 reads."""
        return self.loop[0] if self.carry == "fast_weights" else self.loop[1]

    def layers(self, blocks: int) -> int:
        """How many of `blocks` are those of pass 1, one a layer."""
        return blocks - (self.distinct_passes - 1) * (self.loop[1] - self.loop[0])

    def looped_blocks(self, number: int, blocks: int) -> range:
        """Those of `blocks` that stand for the looped layers in pass `number`, from 1 on."""
        start, end = self.loop
        own = min(number, self.distinct_passes)
        if own == 1:
            return range(start, end)
        first = self.layers(blocks) + (own - 2) * (end - start)
        return range(first, first + end - start)

    def behind(self, block: int, blocks: int) -> int:
        """How far one of `blocks`, and its pass, stands behind the layer that it stands for."""
        start, end = self.loop
        later = block - self.layers(blocks)
        return 0 if later < 0 else block - (start + later % (end - start))

    @property
    def reach(self) -> int | None:
        """How many last slots, its own included, a query sees at most; None for all."""
        return self.window if self.is_sliding else None

    def kept(self, held: Any) -> Any:
        """How many of `held: [R]` slots cross a boundary."""
        # The next token attends to itself as well: window - 1 older ones fill its reach.
        return held.clamp(max=self.window - 1) if self.is_sliding else held * 0

    def memory_fields(self) -> dict[str, Any]:
        """The fields under which a cache means something; it serves any value of the others."""
        return {
            "window": self.window,
            "loop": self.loop,
            "eviction": self.eviction,
            "sleep_attention": self.attention,
            "sleep_carry": self.carry,
        }


def check_sleep(
    window: Any,
    passes: Any,
    eviction: Any,
    schedule: Any,
    attention: Any,
    carry: Any,
    distinct_passes: Any,
    *,
    prefix: str,
) -> None:
    """Raise ValueError for a field out of range; `prefix` stands before the four general names."""
    check_count("window", window)
    check_count(f"{prefix}passes", passes)
    check_choice("eviction", eviction, EVICTIONS)
    check_choice(f"{prefix}schedule", schedule, SCHEDULES)
    check_choice(f"{prefix}attention", attention, ATTENTIONS)
    check_choice(f"{prefix}carry", carry, CARRIES)
    check_count("distinct_passes", distinct_passes)


def check_loop(loop: Any, layers: int | None = None) -> None:
    """Raise ValueError unless `loop` is `(start, end)` with 0 <= start < end (<= `layers`)."""
    if (
        not isinstance(loop, tuple)
        or len(loop) != 2
        or any(isinstance(b, bool) or not isinstance(b, int) for b in loop)
        or not 0 <= loop[0] < loop[1]
        or (layers is not None and loop[1] > layers)
    ):
        allowed = "(start, end) with 0 <= start < end"
        if layers is not None:
            allowed = f"None or {allowed} <= num_hidden_layers={layers}"
        raise ValueError(f"loop must be {allowed}, got {loop!r}")


def check_passes(
    passes: Any, loop: tuple[int, int], fast_weight_layers: Collection[int], name: str = "passes"
) -> Passes:
    """Return `passes` if it is an integer of at least 1 or "auto", else raise ValueError.

    "auto" watches looped fast weights, so it is refused where no layer of the loop has any.
    """
    is_count = isinstance(passes, int) and not isinstance(passes, bool)
    if not (is_count and passes > 0) and passes != "auto":
        raise ValueError(f"{name} must be an integer of at least 1 or 'auto', got {passes!r}")
    if passes == "auto" and not any(i in fast_weight_layers for i in range(*loop)):
        raise ValueError(
            f"{name}='auto' watches looped fast weights, and loop={loop} holds no "
            "state-space layer; allowed is an integer of at least 1"
        )
    return passes


def last_writer(
    options: SleepOptions, fast_weight_layers: Collection[int], attention_layers: Collection[int]
) -> int | None:
    """Index of the last looped or later block whose state survives a boundary; None for none.

    Fast weights always do, keys and values only under sliding eviction. On the last pass later
    blocks are skipped, and this one only updates its state: nothing that survives depends on more.
    """
    writers = [*fast_weight_layers, *(attention_layers if options.is_sliding else ())]
    return max((i for i in writers if i >= options.loop[0]), default=None)
