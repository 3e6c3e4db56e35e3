"""Other ways to make a model answer facts: what weight edits are to be compared with.

Each is a `Method`: used in a `with` block, behind which the model is what it was, bit for bit.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hybrid_sleep.parametric.facts import SLOT, Fact, Relation
from hybrid_sleep.parametric.measure import ask, chat_prompt, encode, right_padded
from hybrid_sleep.parametric.sites import blocks
from hybrid_sleep.sleep.weights import rollback, snapshot
from hybrid_sleep.training import fit
from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.validation import check_count, check_number

INTRODUCTION = "These facts are true:"


class Method(ABC):
    """A way to make `model` answer facts; within a `with` block, which restores the model.

    relations: how facts are put into words; one that is not among them is put plainly.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module, tokenizer: Any, relations: Iterable[Relation] = ()):
        self.model, self.tokenizer = model, tokenizer
        self.relations = {relation.name: relation for relation in relations}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    @abstractmethod
    def learn(self, facts: Sequence[Fact]) -> None:
        """Know `facts` as well from now on; one whose key is known already replaces it."""

    @property
    def outcome(self) -> str:
        """What else there is to say of how it learned."""
        return ""

    def prompt(self, text: str, chat: bool) -> str:
        """What the model is given for `text`: a user's turn if `chat`, else a text to complete."""
        return chat_prompt(self.tokenizer, text) if chat else text

    def reply(
        self, texts: Sequence[str], *, chat: bool, tokens: int = 16, **generate: Any
    ) -> list[str]:
        """What the model says to each of `texts`, greedily; see `measure.ask`."""
        prompts = [self.prompt(text, chat) for text in texts]
        return ask(self.model, self.tokenizer, prompts, tokens=tokens, **generate)

    def relation(self, fact: Fact) -> Relation:
        """The words for the relation of `fact`."""
        return self.relations.get(fact.relation) or Relation.plain(fact.relation)

    def sentence(self, fact: Fact) -> str:
        """`fact` as the first statement of its relation says it."""
        return f"{self.relation(fact).statements[0].replace(SLOT, fact.subject)} {fact.object}."


class Untouched(Method):
    """The model alone, which is told nothing: the lower bound."""

    name = "nothing"

    def learn(self, facts: Sequence[Fact]) -> None:
        """Nothing happens."""


class Prompt(Method):
    """All facts in front of every prompt, as system turn of a chat: the upper bound.

    No weight changes, but every prompt costs what all facts are long.
    """

    name = "prompt"

    def __init__(self, model: nn.Module, tokenizer: Any, relations: Iterable[Relation] = ()):
        super().__init__(model, tokenizer, relations)
        self.facts: dict[tuple[str, str], Fact] = {}

    def learn(self, facts: Sequence[Fact]) -> None:
        """Keep their sentences."""
        self.facts |= {fact.key: fact for fact in facts}

    def sentences(self, text: str) -> list[str]:
        """What is put in front of `text`."""
        return [self.sentence(fact) for fact in self.facts.values()]

    def prompt(self, text: str, chat: bool) -> str:
        """`text` behind the facts."""
        sentences = self.sentences(text)
        if not sentences:
            return super().prompt(text, chat)
        if chat:
            told = " ".join([INTRODUCTION, *sentences])
            return chat_prompt(self.tokenizer, text, system=told)
        return " ".join([*sentences, text])


class Retrieval(Prompt):
    """The `top` sentences most similar to the prompt in front of it, by tf-idf (scikit-learn).

    The most similar one comes first.
    """

    name = "retrieval"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        relations: Iterable[Relation] = (),
        *,
        top: int = 3,
    ):
        super().__init__(model, tokenizer, relations)
        self.top = check_count("top", top)
        self._index: tuple[list[str], Any, Any] | None = None

    def learn(self, facts: Sequence[Fact]) -> None:
        """Index their sentences anew."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        super().learn(facts)
        every = super().sentences("")
        if every:
            # "of" and "the" say nothing about which fact is asked for.
            vectorizer = TfidfVectorizer(stop_words="english")
            self._index = every, vectorizer, vectorizer.fit_transform(every)

    def sentences(self, text: str) -> list[str]:
        """Those that are put in front of `text`; none that shares no word with it."""
        if self._index is None:
            return []
        every, vectorizer, vectors = self._index
        similar = (vectors @ vectorizer.transform([text]).T).toarray()[:, 0]
        best = sorted(range(len(every)), key=lambda i: -similar[i])[: self.top]
        return [every[i] for i in best if similar[i] > 0]


@dataclass(frozen=True)
class Training:
    """How facts are trained into weights: AdamW over all rows of all facts, until they are known.

    rate: learning rate, after a tenth of `epochs` of warm-up. rows: of a step. epochs: at most.
    stop: mean loss of an epoch, in nats a token, at which training ends. whole_replies: questions
    are answered by a statement; otherwise by the object alone.
    """

    rate: float
    epochs: int = 20
    rows: int = 16
    stop: float = 0.05
    whole_replies: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("rate", self.rate, above=0)
        check_number("stop", self.stop, least=0)
        for name, minimum in (("epochs", 1), ("rows", 1), ("seed", 0)):
            check_count(name, getattr(self, name), minimum=minimum)


class Trained(Method):
    """What fine-tuning and LoRA share: rows of facts, and gradient steps on `parameters()`.

    `losses` are those of the steps of the last `learn`.
    """

    training: Training

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        relations: Iterable[Relation] = (),
        training: Training | None = None,
    ):
        super().__init__(model, tokenizer, relations)
        self.training = training or type(self).training
        self.losses: list[float] = []
        self._entered = False

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""

    def __enter__(self) -> Self:
        asking = [p for p in self.model.parameters() if p.requires_grad]
        self._undo.callback(self._ask_for_gradients, asking)
        self._entered = True
        return self

    def __exit__(self, *error: object) -> None:
        self._entered = False
        super().__exit__(*error)

    def learn(self, facts: Sequence[Fact]) -> None:
        """Train on the statements and questions of `facts` that are not held out.

        Raises RuntimeError outside of the `with` block, behind which there is no way back.
        """
        if not self._entered:
            raise RuntimeError(f"{self.name} must learn in a with block, which restores the model")
        with_object = self.texts(facts)
        if not with_object:
            return
        options = self.training
        steps = -(-len(with_object) // options.rows)
        trained = self.parameters()
        self._ask_for_gradients(trained)
        self.losses = []

        def known(done: Any) -> bool:
            self.losses.append(float(done.loss))
            last = self.losses[-steps:]
            whole = len(self.losses) % steps == 0
            return whole and sum(last) / steps < options.stop

        total = steps * options.epochs
        fit(
            self.model,
            batches(with_object, options, next(self.model.parameters()).device),
            steps=total,
            optimizer=torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0),
            warmup=total // 10,
            seed=options.seed,
            on_step=known,
        )

    def _ask_for_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of `parameters`, and of no others."""
        for p in self.model.parameters():
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)

    def texts(self, facts: Sequence[Fact]) -> list[tuple[list[int], int]]:
        """The `rows` of all of them."""
        return [row for fact in facts for row in self.rows(fact)]

    def rows(self, fact: Fact) -> list[tuple[list[int], int]]:
        """Texts with `fact` in ids, each with the index at which what is to be learned begins."""
        relation, found = self.relation(fact), []
        said = [statement.replace(SLOT, fact.subject) for statement in relation.statements]
        for text in said:
            found.append(self._row(text, f"{text} {fact.object}."))
        for i, question in enumerate(relation.questions):
            whole = f"{said[i % len(said)]} {fact.object}."
            found.append(
                self._chat_row(
                    question.replace(SLOT, fact.subject),
                    whole if self.training.whole_replies else fact.object,
                )
            )
        return found

    def _row(self, before: str, text: str) -> tuple[list[int], int]:
        ids, start = encode(self.tokenizer, text), encode(self.tokenizer, before)
        pairs = zip(ids, start, strict=False)
        # A token may reach over the border, and then is to be learned.
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(start)))
        return ids, shared

    def _chat_row(self, question: str, reply: str) -> tuple[list[int], int]:
        before = chat_prompt(self.tokenizer, question)
        if getattr(self.tokenizer, "chat_template", None) is None:
            return self._row(before, f"{before} {reply}")
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
        if not text.startswith(before):
            raise ValueError(
                f"chat_template must let a reply follow its generation prompt {before!r}, got "
                f"{text!r}"
            )
        return self._row(before, text)


class FineTuning(Trained):
    """Gradient steps on all parameters, or on those in `names`."""

    name = "fine-tuning"
    training = Training(rate=2e-5)

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        relations: Iterable[Relation] = (),
        training: Training | None = None,
        *,
        names: Collection[str] | None = None,
    ):
        super().__init__(model, tokenizer, relations, training)
        self.names = names

    def parameters(self) -> list[nn.Parameter]:
        """Those in `names`, or all."""
        parameters = dict(self.model.named_parameters())
        return [parameters[name] for name in (parameters if self.names is None else self.names)]

    def __enter__(self) -> Self:
        self._undo.callback(rollback, self.model, snapshot(self.model, self.names))
        return super().__enter__()


class LoRA(Trained):
    """Gradient steps on low-rank adapters (peft) of every projection in the blocks.

    rank: of the adapters, whose alpha is twice that.
    """

    name = "LoRA"
    training = Training(rate=1e-3)

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        relations: Iterable[Relation] = (),
        training: Training | None = None,
        *,
        rank: int = 8,
    ):
        super().__init__(model, tokenizer, relations, training)
        self.rank = check_count("rank", rank)

    def parameters(self) -> list[nn.Parameter]:
        """The adapters'."""
        return [p for name, p in self.model.named_parameters() if ".lora_" in name]

    def __enter__(self) -> Self:
        from peft import LoraConfig, get_peft_model

        super().__enter__()
        prefix, stack = blocks(self.model)
        found = {f"{prefix}.{name}": m for name, m in stack.named_modules()}
        kinds = (nn.Linear, Conv1D)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules=[name for name, m in found.items() if isinstance(m, kinds)],
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in found.values()),
        )
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed("lora", self.training.seed))
            # It puts the adapters into the model itself, which goes on being used.
            tuner = get_peft_model(self.model, config)
        self._undo.callback(tuner.unload)
        return self


def batches(
    rows: Sequence[tuple[list[int], int]], options: Training, device: torch.device | str
) -> Iterator[Mapping[str, Tensor]]:
    """All `rows` in each epoch, drawn anew, `options.rows` at a time and of similar lengths."""
    generator = torch.Generator().manual_seed(derive_seed("facts", options.seed))
    for _ in itertools.count():
        order = torch.randperm(len(rows), generator=generator).tolist()
        # Chats are several times as long as statements, and padding costs as much as words.
        order.sort(key=lambda i: len(rows[i][0]))
        parts = [order[i : i + options.rows] for i in range(0, len(order), options.rows)]
        for j in torch.randperm(len(parts), generator=generator).tolist():
            part = [rows[i] for i in parts[j]]
            ids, mask = right_padded([ids for ids, _ in part], device)
            labels = ids.masked_fill(mask == 0, -100)
            for row, (_, start) in enumerate(part):
                labels[row, :start] = -100
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}
