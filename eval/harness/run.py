"""`hybrid-sleep eval`: a checkpoint on tasks of lm-evaluation-harness, at several sleep depths."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.harness.result import HarnessResult
from hybrid_sleep.eval.tasks.accuracy import check_depths, parse_depths
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    from hybrid_sleep.eval.tasks import Task
    from hybrid_sleep.training import RunConfig

BOOTSTRAP = 1000  # lm-eval's 100,000 take minutes for metrics whose error has no formula
OFFLINE = "a YAML file of your own (include_path) over local files"


@dataclass(kw_only=True)
class _Asked:
    """What is evaluated: each name with what lm-eval made of it, and the task if it is ours."""

    loaded: dict[str, Any]
    ours: dict[str, Any]
    text: bool


def run(
    checkpoint: str | os.PathLike,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int | str = 1,
    sleep_passes: str | Iterable[int] | None = None,
    sleep_options: Mapping[str, Any] | None = None,
    num_fewshot: int | None = None,
    include_path: str | os.PathLike | None = None,
    task_params: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HarnessResult:
    """The scores of the model in `checkpoint` on each of `tasks` at each depth.

    tasks: names that lm-eval knows, those in `include_path` (a folder of YAML files), and ours,
        `hybrid_sleep_<name>`. A model trained on a task is asked that one, in its tokens; one that
        reads text those that have text.
    limit: documents of each task; None takes all, and 2000 of ours. sleep_passes: depths, such as
        "1,2,4"; None takes the config's. sleep_options: `window`, `loop`, `eviction` or
        `sleep_attention`, `sleep_carry` in place of the config's. task_params: of ours, by name
        without prefix; what is not given is as the checkpoint was trained. seed: which examples of
        ours, which few-shot examples, and what is sampled. batch_size, dtype: see `SleepRequests`.

    `progress(done, total)` counts pairs of task and depth. Interrupted after the first one it
    returns what it has; those that `out`/results.json has of the same code,
    weights, documents and settings are kept.

    Raises ValueError or FileNotFoundError, before anything is evaluated, for a checkpoint that is
    none, a task that is not known, that does not suit the model or whose data are out of reach, and
    for any argument out of range.
    """
    from hybrid_sleep.eval.harness import HybridSleepLM
    from hybrid_sleep.eval.harness.loading import check_sleep_options, find_run
    from hybrid_sleep.eval.harness.names import check_names
    from hybrid_sleep.eval.harness.scores import scores
    from hybrid_sleep.support.resume import Row, collect

    if isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks must be a list of one or more names, each once, got {tasks!r}")
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None:
            check_count(name, value, least)
    check_count("seed", seed, 0)
    if isinstance(sleep_passes, str):
        sleep_passes = parse_depths(sleep_passes)
    check_sleep_options(sleep_options or {})
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path must be a folder, got {str(include_path)!r}")
    check_names(tasks, include_path)
    lm = HybridSleepLM(
        checkpoint, batch_size=batch_size, device=device, dtype=dtype, **(sleep_options or {})
    )
    depths = check_depths([lm.sleep_passes] if sleep_passes is None else sleep_passes)
    folder = Path(checkpoint)
    trained = find_run(folder)
    asked = _load_tasks(
        tasks, trained, task_params or {}, include_path, limit=limit, seed=seed, shots=num_fewshot
    )
    settings = {
        "limit": limit,
        "seed": seed,
        "num_fewshot": num_fewshot,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "batch_size": lm.batch_size,
        "sleep_options": dict(sleep_options or {}),
    }
    about = {
        name: {
            "params": asked.ours[name].params if name in asked.ours else None,
            "in_words": asked.text if name in asked.ours else None,
            "difficulty": asked.ours[name].difficulty if name in asked.ours else None,
            **_guesses(asked.ours.get(name)),
        }
        for name in tasks
    }
    content = {
        "benchmark": HarnessResult.benchmark,
        "checkpoint": folder.name if folder.is_absolute() else folder.as_posix(),
        "parameters": lm.model.num_parameters(),
        "trained_depths": None if trained is None else list(trained.sleep_passes.depths()),
        "config": None if trained is None else trained.to_dict(),
        "tasks": about,
        "depths": depths,
        **settings,
        "rows": [],
        "command": command,
        "provenance": {**provenance(device), **_versions()},
    }
    weights = _digest_weights(folder)
    wanted = [
        {"task": name, "depth": depth, "inputs": _digest([weights, settings, *documents])}
        for name, documents in ((name, _documents(asked.loaded[name], limit)) for name in tasks)
        for depth in depths
    ]

    def measure(names: Row) -> Row:
        name = names["task"]
        lm.sleep_passes = names["depth"]
        began = time.perf_counter()
        found = _evaluate(lm, asked.loaded[name], limit=limit, shots=num_fewshot, seed=seed)
        seconds = time.perf_counter() - began
        guesses = about[name]["floor"], about[name]["majority"]
        return {"seconds": seconds, **scores(found, *guesses)}

    return HarnessResult.from_content(
        collect(content, wanted, measure, out=out, progress=progress)
    )


def parse_task_params(text: str) -> dict[str, dict[str, Any]]:
    """`{task: {parameter: value}}` from YAML (or JSON), such as `rule110: {steps: 4}`.

    Raises ValueError for anything else.
    """
    from hybrid_sleep.training.parsing import parse_yaml

    what = f"task_params must be such as 'rule110: {{steps: 4}}', got {text!r}"
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(x, dict) for x in content.values()):
        raise ValueError(what)
    return content


def parse_sleep_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options from texts such as `window=256` or `loop=[1, 3]`; ValueError for anything else."""
    from hybrid_sleep.eval.harness.loading import check_sleep_options
    from hybrid_sleep.training.parsing import parse_overrides

    try:
        return check_sleep_options(dict(parse_overrides(texts, "window=256")))
    except ValueError as error:
        raise ValueError(f"sleep: {error}") from None


def _load_tasks(
    names: Sequence[str],
    trained: RunConfig | None,
    params: Mapping[str, Mapping[str, Any]],
    include_path: str | os.PathLike | None,
    *,
    limit: int | None,
    seed: int,
    shots: int | None,
) -> _Asked:
    from hybrid_sleep.eval.harness import tasks

    ours = [name for name in names if name in tasks.names()]
    for name in params:
        if tasks.PREFIX + name not in ours:
            raise ValueError(
                "task_params must be of those tasks of ours that are evaluated, "
                f"{', '.join(x.removeprefix(tasks.PREFIX) for x in ours) or 'none'}, got {name!r}"
            )
    # A model of a task has no tokenizer but that of the task.
    text = trained is None or trained.text is not None
    if not text:
        own = tasks.PREFIX + trained.task.name
        for name in ours:
            if name != own:
                raise ValueError(
                    f"of our tasks, a checkpoint must be evaluated on the one whose tokens it was "
                    f"trained on, {own}, got {name!r}"
                )
        if ours and trained.task.repeats > 1:
            raise ValueError(
                f"task.repeats must be 1 in the training of a checkpoint that lm-eval asks {own}, "
                f"got {trained.task.repeats}; hybrid-sleep bench depth asks it as it was trained"
            )
        if ours and shots:
            raise ValueError(
                f"num_fewshot must be 0 with {own}, as the model was trained, got {shots}"
            )
        params = {trained.task.name: {**trained.task.params, **params.get(trained.task.name, {})}}
    options = {"count": limit or tasks.COUNT, "seed": seed, "text": text}
    options["include_path"] = None if include_path is None else os.fspath(include_path)
    manager = tasks.task_manager(params, include_defaults=False, **options)
    if not all(name in manager.task_index for name in names):
        manager = tasks.task_manager(params, include_defaults=True, **options)
    loaded = {name: _load(manager, name) for name in names}
    found = {name: loaded[name]["tasks"][name].task for name in ours}
    return _Asked(loaded=loaded, ours=found, text=text)


def _load(manager: Any, name: str) -> Any:
    from hybrid_sleep.eval.harness import tasks
    from hybrid_sleep.eval.harness.names import unknown_task

    own = ", ".join(tasks.names())
    if name not in manager.task_index:
        raise unknown_task(name)
    try:
        return manager.load([name])
    except Exception as error:  # datasets, huggingface_hub and tasks all raise their own
        if name in tasks.names():
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"tasks must be loadable, got {name!r} ({type(error).__name__}: {reason}): most of "
            f"lm-eval's tasks fetch their data from the hub; without it there are {own}, "
            f"{OFFLINE}, and what was fetched before"
        ) from error


def _evaluate(lm: Any, loaded: Any, *, limit: int | None, shots: int | None, seed: int) -> Any:
    """lm-eval's own result, seeded, in greater detail than it shows."""
    import random

    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for task in loaded["tasks"].values():
        given = task.get_config("num_fewshot")
        # As lm-eval has it: a task that says 0 means it.
        if given is None or (shots is not None and given != 0):
            task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(seed=seed)
    return evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=True)


def _guesses(task: Task | None) -> dict[str, Any]:
    """What the best guess without memory and the most frequent label score, as in JSON."""
    if task is None:
        return {"floor": None, "majority": None}
    majority = task.majority()
    return {
        "floor": {str(level): share for level, share in task.floor().items()},
        "majority": {"exact": majority.exact, "per_label": majority.per_label},
    }


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("lm_eval", "datasets")}


def _documents(loaded: Any, limit: int | None) -> list[Any]:
    """The documents that are asked about, with the settings of their tasks."""
    found = []
    for name, task in loaded["tasks"].items():
        docs = task.eval_docs
        kept = [docs[i] for i in range(min(limit or len(docs), len(docs)))]
        found.append([name, task.dump_config(), kept])
    return found


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:12]


def _digest_weights(folder: Path) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("token*")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
