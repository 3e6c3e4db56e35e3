"""The demo's page, its table for the terminal, and its figure."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.render import depth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.demo import DemoResult, Generation

ENOUGH = 0.95
NO_BASELINE = (
    "The baseline (the same model trained at N = 1 alone) is not part of this installation; it is "
    "in the repository, eval/results/depth_demo."
)


def table(result: DemoResult) -> Any:
    """Accuracy by depth and difficulty as a rich table, the baseline and the floor below it."""
    from rich.table import Table

    (run,) = result.runs
    name = result.task.difficulty
    shown = Table(title=f"Random circuits, seed {run.seed}: accuracy by sleep depth and {name}")
    for column in ("", *(f"{name} = {level}" for level in result.levels), "ms per example"):
        shown.add_column(column, justify="right")
    times = {f"depth {n}": f"{1000 * result.seconds_per_example(n):.2f}" for n in result.depths}
    for row, shares in depth.by_level(result):
        time = times.get(row, "")
        shown.add_row(row, *(f"{share:.3f}" for share in shares), time)
    return shown


def words(result: DemoResult) -> list[str]:
    """What the numbers mean, paragraph by paragraph; for the terminal and for results.md."""
    (run,) = result.runs
    best = result.best_depth
    reached = [
        (level, [N for N in result.depths if result.of_level(level, N).mean >= ENOUGH])
        for level in result.levels
    ]
    reach = ", ".join(f"{level} at N = {found[0]}" for level, found in reached if found)
    return [
        "One checkpoint. What is the value of a gate, asked when the circuit has left the window: "
        "each question is one token, its answer one forward pass, whatever the depth of the sleep "
        f"before it. On {result.task.difficulty} = {result.hardest} accuracy is "
        f"{result.judged(1).mean:.3f} at N = 1 and {result.judged(best).mean:.3f} at N = {best}. "
        f"First above {ENOUGH:.2f}: {reach or 'none'}. Deepest in training: "
        f"N = {max(run.trained_depths)}.",
        NO_BASELINE if result.baseline is None else depth.baseline_words(result),
        *_repeated(result),
        f"{result.seconds:.0f} s in all, {result.seconds_training:.0f} s of them training.",
    ]


def _repeated(result: DemoResult) -> list[str]:
    """What another look buys without a second pass."""
    if not result.repeated:
        return []
    (run,) = result.runs
    times, share = max(run.trained_depths), mean(result.repeated)
    return [
        f"Where each window is written {times} times, N = 1 reaches {share:.3f} for the same "
        "compute (docs/results.md)."
    ]


def written(generation: Generation) -> list[str]:
    """What the model wrote across windows, and what each sleep reported, line by line."""
    window, answer = generation.window, generation.answer
    tokens = generation.prompt + generation.generated
    windows = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    reply = generation.generated[0]
    verdict = "correct" if reply == answer else f"wrong, {answer} would be correct"
    return [
        f"The same model writing on at depth {generation.depth}, windows of {window} tokens:",
        *("  " + " ".join(map(str, part)) for part in windows),
        f"  Asked for {generation.question}, it says token {reply}: {verdict}. What follows was "
        "never trained; it is there to show the sleeps.",
        *(f"  sleep {number}: {said}" for number, said in enumerate(generation.said, 1)),
    ]


def markdown(result: DemoResult) -> str:
    """The demo's page."""
    lines = [
        f"# Accuracy against sleep depth, seed {result.runs[0].seed}",
        "",
        "![Accuracy against sleep depth, by level of the gate](accuracy.png)",
        "",
    ]
    for paragraph in words(result):
        lines += [paragraph, ""]
    lines += [*depth.level_table(result), "", depth.task_line(result), *result.footer()]
    if result.baseline is not None:
        lines += ["", f"Baseline: `{result.baseline.command}`"]
    if result.generation is not None:
        lines += ["", "```", *written(result.generation), "```"]
    return "\n".join(lines) + "\n"


def figure(result: DemoResult) -> Figure:
    """As for `bench depth`, with the baseline."""
    return depth.figure(result)
