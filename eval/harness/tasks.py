"""Our tasks in lm-eval, as `hybrid_sleep_<name>`: drawn here, so that they need no network.

A model trained on a task is evaluated in the task's tokens, each a word; any model that generates
text, on the tasks that have problems in words. In tokens, a label's log probability is that given
everything before it, so that the scores are those of the depth benchmark: an example is correct if
every label is the most likely token there.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.harness.likelihood import Likelihood
from hybrid_sleep.eval.harness.loading import check_installed
from hybrid_sleep.eval.harness.model import NAME
from hybrid_sleep.eval.harness.tokenizer import task_words
from hybrid_sleep.eval.tasks import IGNORED, TASKS, Task, load
from hybrid_sleep.eval.tasks.gsm_infinite import parse_answer, parse_set
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PREFIX = f"{NAME}_"
COUNT = 2000
SHOTS = 32  # examples that few-shot prompts are drawn from
REPLY_TOKENS = 512


def names() -> list[str]:
    """What our tasks are called in lm-eval."""
    return [PREFIX + name for name in sorted(TASKS)]


def task_manager(
    params: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    text: bool = False,
    count: int = COUNT,
    seed: int = 0,
    **kwargs: Any,
) -> TaskManager:
    """lm-eval's TaskManager, which knows our tasks besides its own.

    params: of each of our tasks by its name, such as `{"rule110": {"steps": 4}}`; others have their
        defaults. text: problems in words, not in tokens. count, seed: the first `count` examples of
        (test, `seed`). kwargs: those of TaskManager; `include_defaults=False` leaves lm-eval's own
        tasks out, which take it several seconds to list.

    Raises ValueError for a task or parameter that does not exist, if lm_eval is not installed, and,
    when such a task is loaded, for one that has no words where `text` asks for them.
    """
    check_installed()
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    check_count("count", count)
    check_count("seed", seed, 0)
    for name, given in (params or {}).items():
        load(name, **given)
    manager = TaskManager(**kwargs)
    for name in TASKS:
        drawn = {"task": name, "params": dict((params or {}).get(name, {}))}
        manager.task_index[PREFIX + name] = Entry(
            name=PREFIX + name,
            kind=Kind.PY_TASK,
            yaml_path=None,
            cfg={
                "task": PREFIX + name,
                "class": _classes()[text],
                "metadata": {"version": 1, **drawn, "count": count, "seed": seed},
            },
        )
    return manager


def supervised_spans(
    input_ids: Sequence[int], labels: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """Where a sequence is supervised: (start, tokens) of each span that one request can score.

    The tokens are continuations of `input_ids[:start]`; some may have no label. A label that is not
    the token at its place ends a span, because what follows is conditioned on that token. A label
    at the very start, which nothing predicts, is left out.
    """
    start = end = None
    for place in range(1, len(labels)):
        if labels[place] == IGNORED:
            continue
        start, end = place if start is None else start, place + 1
        if labels[place] != input_ids[place]:
            yield start, [*input_ids[start:place], labels[place]]
            start = None
    if start is not None:
        yield start, list(input_ids[start:end])


class HarnessTask(ABC):
    """What our tasks have in common; the base class after it is lm-eval's ConfigurableTask.

    `task` is the task itself, `text` says whether it is evaluated in words.
    """

    text: bool
    settings: Mapping[str, Any]

    def __init__(self, config: Mapping[str, Any]):
        drawn = config["metadata"]
        self.task: Task = load(drawn["task"], **drawn["params"])
        self.count, self.seed = drawn["count"], drawn["seed"]
        metadata = {**drawn, "params": self.task.params, "text": self.text}
        super().__init__(
            config={
                "task": config["task"],
                "test_split": "test",
                "doc_to_text": "context",
                "doc_to_target": "target",
                "metadata": metadata,
                **self.settings,
            }
        )

    def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        """Draw the examples."""
        from datasets import Dataset

        wanted = {"test": self.count, "train": SHOTS} if self.text else {"test": self.count}
        self.dataset = {
            split: Dataset.from_list(
                [self._doc(x) for x in self.task.examples(split, self.seed, number)]
            )
            for split, number in wanted.items()
        }

    @abstractmethod
    def _doc(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """An example as lm-eval keeps it: `context` and `target` as texts."""

    def aggregation(self) -> dict[str, Any]:
        """How the scores of single examples make one."""
        from lm_eval.api.metrics import mean

        shares = ("per_question",) if self.text else ("per_question", "per_label")
        return {"exact": mean, **dict.fromkeys(shares, _share)}

    def higher_is_better(self) -> dict[str, bool]:
        """For every score it is."""
        return dict.fromkeys(self.aggregation(), True)


class TokenTask(HarnessTask):
    """A task in its tokens: the log probability of its labels, token by token."""

    text = False
    settings = {"output_type": "loglikelihood", "num_fewshot": 0, "fewshot_config": {"samples": []}}

    @functools.cached_property
    def _words(self) -> list[str]:
        return task_words(self.task)

    def _doc(self, example: Mapping[str, Any]) -> dict[str, Any]:
        asked = next(supervised_spans(example["input_ids"], example["labels"]))
        context, target = self._request(example["input_ids"], *asked)
        return {
            "input_ids": example["input_ids"],
            "labels": example["labels"],
            "difficulty": _levels(example),
            "context": context,
            "target": target,
        }

    def _request(self, input_ids: Sequence[int], start: int, tokens: list[int]) -> tuple[str, str]:
        before = " ".join(self._words[token] for token in input_ids[:start])
        return before, " " + " ".join(self._words[token] for token in tokens)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Any]:
        """One request for each span of labels."""
        from lm_eval.api.instance import Instance

        spans = supervised_spans(doc["input_ids"], doc["labels"])
        kwargs.pop("chat_template", None)
        if kwargs.pop("apply_chat_template", False) or ctx != doc["context"]:
            raise ValueError(
                f"{self.config.task} must have no chat template and no text before it, as it is "
                "evaluated in the tokens that the model was trained on"
            )
        return [
            Instance(
                request_type="loglikelihood",
                doc=doc,
                arguments=self._request(doc["input_ids"], start, tokens),
                idx=index,
                **kwargs,
            )
            for index, (start, tokens) in enumerate(spans)
        ]

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """`exact` of one example, and its questions and labels as [difficulty, right, of]."""
        labels = doc["labels"]
        predicted = [-1] * len(labels)
        asked = supervised_spans(doc["input_ids"], labels)
        for (start, tokens), result in zip(asked, results, strict=True):
            right = result.correct if isinstance(result, Likelihood) else ()
            if len(right) != len(tokens):
                raise ValueError(
                    f"{self.config.task} must be evaluated by --model {NAME} of a model trained on "
                    "it, whose tokenizer has a word for each of its tokens"
                )
            for place, token in enumerate(right, start):
                predicted[place] = labels[place] if token else -1
        example = {**doc, "meta": {"difficulty": doc["difficulty"]}}
        score = self.task.score([predicted], [example])
        asked_for = [(place, label) for place, label in enumerate(labels) if label != IGNORED]
        hits = sum(predicted[place] == label for place, label in asked_for)
        return {
            "exact": score["exact"],
            "per_question": [
                [level, round(score["by_difficulty"][level] * of), of]
                for level, of in score["questions"].items()
            ],
            "per_label": [[None, hits, len(asked_for)]],
        }


class TextTask(HarnessTask):
    """A task in words: the model generates its answer, a number or the names of variables.

    `parse_answer` or `parse_set` finds it in the reply.
    """

    text = True
    settings = {
        "output_type": "generate_until",
        "training_split": "train",
        "fewshot_split": "train",
        "generation_kwargs": {
            "until": ["\n\n"],
            "do_sample": False,
            "max_gen_toks": REPLY_TOKENS,
        },
    }

    def _doc(self, example: Mapping[str, Any]) -> dict[str, Any]:
        meta = example["meta"]
        answers = meta.get("answer_list", [meta.get("answer")])
        if "problem" not in meta or "question" not in meta or answers == [None]:
            raise ValueError(
                f"{self.config.task} must be evaluated on a model trained on it, as it has no "
                "problems in words, which the checkpoint needs"
            )
        return {
            "context": f"{meta['problem']}\n{meta['question']}\nAnswer:",
            "target": ", ".join(map(str, answers)),
            "names": "answer_list" in meta,
            "difficulty": _levels(example),
        }

    def process_results(self, doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
        """`exact` of one reply, and its question as [difficulty, right, of]."""
        if doc["names"]:
            right = int(parse_set(results[0]) == set(doc["target"].split(", ")))
        else:
            right = int(parse_answer(results[0]) == int(doc["target"]))
        return {"exact": float(right), "per_question": [[doc["difficulty"][0], right, 1]]}


@functools.cache
def _classes() -> tuple[type, type]:
    """The classes of tasks in tokens and in words."""
    from lm_eval.api.task import ConfigurableTask

    return tuple(
        type(base.__name__, (base, ConfigurableTask), {"__module__": __name__})
        for base in (TokenTask, TextTask)
    )


def _levels(example: Mapping[str, Any]) -> list[int]:
    level = example["meta"]["difficulty"]
    return [level] if isinstance(level, int) else list(level)


def _share(items: Sequence[Sequence[Sequence[Any]]]) -> float:
    """The share of all questions, or labels, that are correct."""
    counts = [count for item in items for count in item]
    return sum(right for _, right, _ in counts) / sum(of for _, _, of in counts)
