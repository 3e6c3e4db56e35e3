"""Train a model of the small world: `python -m hybrid_sleep.eval.facts.train --seed 0`.

The committed checkpoints come from this command; with the same versions of torch and of the code
it gives the same weights again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybrid_sleep.eval.facts.accuracy import KINDS, accuracy
from hybrid_sleep.eval.facts.words import build_tokenizer
from hybrid_sleep.eval.facts.world import World
from hybrid_sleep.eval.tasks.sampling import Stream
from hybrid_sleep.support.terminal import never_fail_on_characters

MEASURED = 100  # known facts, in every wording
BEHIND = (0, 1, 8)  # windows
DEPTHS = (1, 2, 3, 4)
LOG_EVERY = 50


def backbone() -> dict[str, Any]:
    """Fields of the model's config, but for the tokenizer's."""
    return {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_attention_heads": 4,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "window": 32,
        "sleep_schedule": "every_window",
    }


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    windows: how many windows the rows of a step have, as pairs of a weight and a number; tokens:
    of a step, in as many rows as there is room for. Every token is supervised, as pass 1 predicts
    it, and every full window sleeps, at a depth drawn anew for each step.
    """

    model: dict[str, Any] = field(default_factory=backbone)
    steps: int = 1000
    tokens: int = 2048
    windows: tuple[tuple[int, int], ...] = ((60, 1), (20, 2), (12, 4), (8, 9))
    sleep_passes: dict[str, list[int]] = field(default_factory=lambda: {"uniform": [1, 4]})
    lr_muon: float = 0.02
    lr_adamw: float = 4e-3
    schedule: str = "trapezoid"
    warmup: int = 50
    cooldown: float = 0.4
    grad_clip: float = 1.0


def batches(world: World, tokenizer: Any, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Training batches without end: rows full of sentences, the last one cut off."""
    import torch

    stream = Stream(world.seed, 5)
    source = world.sentences()
    while True:
        columns = stream.weighted(recipe.windows) * recipe.model["window"]
        rows = []
        for _ in range(max(1, recipe.tokens // columns)):
            # A prompt has no bos, what the model writes by itself begins with one.
            row = [tokenizer.bos_token_id] if stream.chance(50) else []
            while len(row) < columns:
                text = " ".join(itertools.islice(source, 4))
                row += tokenizer(text).input_ids
            rows.append(row[:columns])
        ids = torch.tensor(rows)
        yield {"input_ids": ids, "labels": ids}


def train(seed: int, recipe: Recipe | None = None, *, log: Any = None) -> tuple[Any, Any]:
    """A model trained on world `seed`, from weights of that seed too: (model, record of `fit`).

    log: called with a line of text now and then.
    """
    import torch

    from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
    from hybrid_sleep.training import fit, optimizer_for

    recipe = recipe or Recipe()
    world, tokenizer = World(seed), build_tokenizer()
    config = HybridSleepConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **recipe.model,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HybridSleepForCausalLM(config)

    def report(done: Any) -> None:
        if log is not None and (done.step + 1) % LOG_EVERY == 0:
            log(f"step {done.step + 1} of {recipe.steps}: loss {done.loss:.3f}")

    record = fit(
        model,
        batches(world, tokenizer, recipe),
        steps=recipe.steps,
        optimizer=optimizer_for(model, recipe.lr_muon, recipe.lr_adamw),
        schedule=recipe.schedule,
        warmup=recipe.warmup,
        cooldown=recipe.cooldown,
        grad_clip=recipe.grad_clip,
        sleep_passes=recipe.sleep_passes,
        seed=seed,
        on_step=report,
    )
    return model.eval(), record


def measure(model: Any, world: World) -> list[dict[str, Any]]:
    """Accuracy on known facts behind each of `BEHIND` windows, slept at each of `DEPTHS`."""
    tokenizer = build_tokenizer()
    facts = world.known_facts()
    some = [facts[i] for i in Stream(world.seed, 6).distinct(len(facts), MEASURED)]
    rows = []
    for windows in BEHIND:
        for depth in DEPTHS if windows else (1,):
            shares = accuracy(model, tokenizer, world, some, windows=windows, passes=depth)
            rows.append({"windows": windows, "depth": depth, **shares})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Train, save in half precision, load again and measure what was saved."""
    import torch

    from hybrid_sleep import HybridSleepForCausalLM
    from hybrid_sleep.support.io import write_json_atomic
    from hybrid_sleep.support.provenance import provenance
    from hybrid_sleep.training.run import threads

    parser = argparse.ArgumentParser(prog="python -m hybrid_sleep.eval.facts.train")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the weights")
    parser.add_argument("--out", type=Path, help="the folder to write; default: out/world/seedN")
    never_fail_on_characters()
    given = parser.parse_args(arguments)
    out = given.out or Path("out") / "world" / f"seed{given.seed}"

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    recipe = Recipe()
    with threads(1):  # sums of several threads would depend on how many there are
        began = time.process_time()
        model, record = train(given.seed, recipe, log=log)
        worked = time.process_time() - began
        model.half().save_pretrained(out)
        build_tokenizer().save_pretrained(out)
        saved = HybridSleepForCausalLM.from_pretrained(out, dtype=torch.float32)
        rows = measure(saved, World(given.seed))
        training = {
            "command": f"python -m hybrid_sleep.eval.facts.train --seed {given.seed}",
            "recipe": asdict(recipe),
            "seconds": round(record.seconds, 1),
            "processor_seconds": round(worked, 1),
            "loss": sum(record.losses[-LOG_EVERY:]) / LOG_EVERY,
            "facts": MEASURED,
            "known": rows,
            "provenance": provenance(),
        }
        write_json_atomic(out / "training.json", training)
    print("windows depth " + " ".join(f"{kind:>17}" for kind in KINDS))
    for row in rows:
        shares = " ".join(f"{row[kind]:17.3f}" for kind in KINDS)
        print(f"{row['windows']:7} {row['depth']:5} {shares}")
    print(f"{record.seconds:.0f} s of training, {worked:.0f} s of processor time; wrote {out}")


if __name__ == "__main__":
    main()
