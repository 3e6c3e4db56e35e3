"""What a model answers: greedy generation and exact words, never teacher-forced token accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.sites import frozen

TOKENS = 12
AT_ONCE = 32
BINS = 15
# Words that no template has.
QUESTION = "Quo usque tandem?"


def ask(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int = TOKENS,
    at_once: int = AT_ONCE,
    **generate: Any,
) -> list[str]:
    """The greedy continuation of each of `prompts`, in text, of at most `tokens` tokens.

    Prompts that a chat template made (`chat_prompt`) are taken as they are. Other arguments are
    those of `greedy`.
    """
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    answers = greedy(model, tokenizer, rows, tokens=tokens, at_once=at_once, **generate)
    return list(tokenizer.batch_decode(answers, skip_special_tokens=True))


@torch.no_grad()
def greedy(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    *,
    tokens: int = TOKENS,
    at_once: int = AT_ONCE,
    cache: Any = None,
    **generate: Any,
) -> list[list[int]]:
    """The greedy continuation of each of `rows` (ids), of at most `tokens` tokens; pads may follow.

    cache: of `model`, of one row, from which each goes on; left as it was. generate: further
    arguments of `model.generate`, such as `sleep_passes`.
    """
    ids = [list(row) for row in rows]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers: dict[int, list[int]] = {}
    device = next(model.parameters()).device
    pad = pad_token(tokenizer)
    with frozen(model):
        for first in range(0, len(order), at_once):
            part = order[first : first + at_once]
            begun, mask = left_padded([ids[i] for i in part], pad, device)
            out = model.generate(
                begun,
                **going_on(cache, mask),
                max_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                **generate,
            )
            answers.update(zip(part, out[:, begun.shape[1] :].tolist(), strict=True))
    return [answers[i] for i in range(len(ids))]


def going_on(cache: Any, mask: Tensor) -> dict[str, Any]:
    """Arguments of `model.generate` by which each row of `mask` goes on from `cache`, of one row,
    which stays as it was; without one, the mask alone."""
    if cache is None:
        return {"attention_mask": mask}
    # A mask that covers the past says that all of these tokens are new.
    longer = torch.cat((torch.ones_like(mask[:, :1]), mask), 1)
    return {"cache": repeated(cache, len(mask)), "attention_mask": longer}


def repeated(cache: Any, rows: int) -> Any:
    """A cache of `rows` rows, each as the one row of `cache`."""
    held = cache.copy()
    held.batch_repeat_interleave(rows)
    return held


def states(text: str, answer: str) -> bool:
    """Whether the continuation `text` of a statement begins with `answer`, in whole words."""
    return re.match(rf"\s*{re.escape(answer)}(?!\w)", text) is not None


def mentions(text: str, answer: str) -> bool:
    """Whether the reply `text` has `answer` in it, in whole words."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


def chat_prompt(tokenizer: Any, question: str, system: str | None = None) -> str:
    """`question` as a user's turn, up to where the reply begins; plain text without a template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return f"{'' if system is None else system + chr(10)}Question: {question}\nAnswer:"
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def opening(tokenizer: Any) -> str:
    """What `chat_prompt` puts before a question."""
    before, found, _ = chat_prompt(tokenizer, QUESTION).partition(QUESTION)
    return before if found else ""


def user_turn(tokenizer: Any) -> list[int]:
    """Ids of what stands before a user's words in a chat; empty without a template."""
    before = opening(tokenizer)
    templated = getattr(tokenizer, "chat_template", None) is not None
    return encode(tokenizer, before) if templated and before else []


def pad_token(tokenizer: Any) -> int:
    """A token to fill rows with; any does, as it is masked."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` as the model reads the start of a text: with a first token, without a last."""
    ids = list(tokenizer(text, add_special_tokens=not _has_specials(tokenizer, text))["input_ids"])
    end = getattr(tokenizer, "eos_token_id", None)
    end_text = getattr(tokenizer, "eos_token", None)
    # Some tokenizers close every text, after which no model would go on with it.
    if len(ids) > 1 and ids[-1] == end and not text.endswith(end_text or "\0"):
        ids = ids[:-1]
    return ids


def _has_specials(tokenizer: Any, text: str) -> bool:
    first = getattr(tokenizer, "bos_token", None)
    return first is not None and text.startswith(first)


@dataclass(frozen=True)
class Reading:
    """What a model says of the predicted tokens of some text, one row at a time.

    losses: `[N]`, negative log likelihood of each (nats, fp64). confidences: `[N]`, probability of
    the model's first guess (fp64). right: `[N]`, whether that is the token.
    """

    losses: Tensor
    confidences: Tensor
    right: Tensor

    @property
    def perplexity(self) -> float:
        """e to the mean loss."""
        return float(self.losses.mean().exp())

    @property
    def calibration_error(self) -> float:
        """`calibration_error` of the first guesses."""
        return calibration_error(self.confidences, self.right)


def calibration_error(confidences: Tensor, right: Tensor, bins: int = BINS) -> float:
    """The expected calibration error of guesses `[N]` with these probabilities, of 0 to 1.

    Guo et al. (arXiv 1706.04599), Eq. 3: over bins of guesses that are nearly as confident,
    `sum_b n_b / N |accuracy_b - mean confidence_b|`. Their bins are of equal width, most of which
    hold few tokens of a language model; these hold an equal number each, as nearly as N allows.
    Guesses that are just as confident share their accuracy, so that no order decides. Raises
    ValueError for none.
    """
    if len(confidences) != len(right) or not len(right):
        raise ValueError(
            f"right must be one for each of one or more guesses, got {len(right)} for "
            f"{len(confidences)}"
        )
    values, order = confidences.double().sort()
    _, group = values.unique(return_inverse=True)
    accuracy = group.bincount(right[order].double()) / group.bincount()
    gaps = (accuracy[group] - values).tensor_split(min(bins, len(values)))
    return float(torch.stack([gap.sum().abs() for gap in gaps]).sum()) / len(values)


@torch.no_grad()
def read(
    model: nn.Module, rows: Sequence[Sequence[int]], at_once: int = 16, **forward: Any
) -> Reading:
    """What `model` says of all tokens of `rows` (ids), the first of each excepted.

    Raises ValueError if nothing is predicted.
    """
    device = next(model.parameters()).device
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with frozen(model):
        for first in range(0, len(rows), at_once):
            part = [list(row) for row in rows[first : first + at_once] if len(row) > 1]
            if not part:
                continue
            ids, mask = right_padded(part, device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **forward).logits[
                :, :-1
            ]
            predicted = mask[:, 1:].bool()
            said, tokens = logits[predicted].float(), ids[:, 1:][predicted]
            losses = nn.functional.cross_entropy(said, tokens, reduction="none")
            best, guess = said.max(-1)
            confidence = (best - said.logsumexp(-1)).exp()
            parts.append(
                (losses.double().cpu(), confidence.double().cpu(), (guess == tokens).cpu())
            )
    if not parts:
        raise ValueError("rows must hold a token behind another, got none")
    return Reading(*(torch.cat(column) for column in zip(*parts, strict=True)))


def perplexity(
    model: nn.Module, rows: Sequence[Sequence[int]], at_once: int = 16, **forward: Any
) -> float:
    """e to the mean negative log likelihood of a token of `rows`; see `read`."""
    return read(model, rows, at_once, **forward).perplexity


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, T]` of rows of different lengths, to be continued."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return ids, torch.tensor(mask, device=device)


def right_padded(
    rows: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, T]` of rows of different lengths."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(width, device=device) < lengths[:, None]).long()
