"""The demo's page, its table for the terminal, and its figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.render import depth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.demo import DemoResult, Generation

NO_BASELINE = (
    "The baseline (the same model trained at N = 1 alone) is not part of this installation; it is "
    "in the repository, eval/results/baseline_n1."
)


def table(result: DemoResult) -> Any:
    """Accuracy by depth as a rich table, majority below it."""
    from rich.table import Table

    (run,) = result.runs
    shown = Table(title=f"Rule 110, seed {run.seed}: accuracy by sleep depth")
    for column in ("depth N", "exact", "95 % interval", "per label", "ms per example"):
        shown.add_column(column, justify="right")
    for number, accuracy in run.accuracy.items():
        low, high = result.interval(run, number)
        shown.add_row(
            str(number),
            f"{accuracy.exact:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{accuracy.per_label:.3f}",
            f"{1000 * result.seconds_per_example(number):.2f}",
            style="bold" if number == result.best_depth else None,
        )
    majority = result.task.majority
    shown.add_row("majority", f"{majority['exact']:.3f}", "", f"{majority['per_label']:.3f}", "")
    return shown


def words(result: DemoResult) -> list[str]:
    """What the numbers mean, paragraph by paragraph; for the terminal and for results.md."""
    (run,) = result.runs
    best = result.best_depth
    return [
        "One checkpoint, trained with its sleep depth drawn from "
        f"{', '.join(map(str, run.trained_depths))}: exact accuracy {run.accuracy[1].exact:.3f} at "
        f"depth 1, at best {run.accuracy[best].exact:.3f} (depth {best}). Always guessing the most "
        f"frequent label scores {result.task.majority['exact']:.3f}.",
        NO_BASELINE if result.baseline is None else depth.baseline_words(result),
        f"{result.seconds:.0f} s in all, {result.seconds_training:.0f} s of them training.",
    ]


def written(generation: Generation) -> list[str]:
    """What the model wrote across windows, and what each sleep reported, line by line."""
    window, answers = generation.window, generation.answers
    tokens = generation.prompt + generation.generated
    windows = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    answered = generation.generated[: len(answers)]
    verdict = "correct" if answered == answers else f"wrong, {answers} would be correct"
    return [
        f"The same model writing on at depth {generation.depth}, windows of {window} tokens:",
        "  " + " ".join("".join(str(token) for token in part) for part in windows),
        f"  After the separator (2) comes its answer, {answered}: {verdict}. What follows was "
        "never trained; it is there to show the sleeps.",
        *(f"  sleep {number}: {said}" for number, said in enumerate(generation.said, 1)),
    ]


def markdown(result: DemoResult) -> str:
    """The demo's page."""
    lines = [
        f"# Accuracy against sleep depth, seed {result.runs[0].seed}",
        "",
        "![Exact accuracy against sleep depth](accuracy.png)",
        "",
    ]
    for paragraph in words(result):
        lines += [paragraph, ""]
    lines += [*depth.accuracy_table(result), "", depth.task_line(result), *result.footer()]
    if result.baseline is not None:
        lines += ["", f"Baseline: `{result.baseline.command}`"]
    if result.generation is not None:
        lines += ["", "```", *written(result.generation), "```"]
    return "\n".join(lines) + "\n"


def figure(result: DemoResult) -> Figure:
    """As for `bench depth`, with the baseline."""
    return depth.figure(result)
