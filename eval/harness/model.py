"""The model that lm-eval calls `hybrid_sleep`: its requests, answered by a model that sleeps.

lm-eval's own adapter for transformers would do, but for three things. It pads texts on the right
with token 0 and no mask, so that pads are read, and slept on. It asks tokenizers to add what they
like, and some add an end of text to every prompt. And it reads a text again for each continuation,
and for each label of one example.

Here a batch has its mask; of requests of which one's tokens begin another's, such as the labels of
one example, the longest alone is read; and a context that several requests of a batch begin with,
such as the choices of one question, is read and slept on once. What each row gets is what it would
get alone: a row sleeps when its own window is full.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybrid_sleep.eval.harness.batches import (
    group_by_beginning,
    pad,
    side_by_side,
    stop_criteria,
)
from hybrid_sleep.eval.harness.loading import check_installed, find_run, load_model
from hybrid_sleep.eval.harness.tokenizer import load_tokenizer
from hybrid_sleep.support.progress import progress_bar
from hybrid_sleep.training.text.tokenizer import Encoder
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    from hybrid_sleep import HybridSleepForCausalLM
    from hybrid_sleep.sleep.options import Passes

NAME = "hybrid_sleep"
LARGEST_BATCH = 64
LOGITS_AT_ONCE = 1 << 26

logger = logging.getLogger(__name__)


class Likelihood(tuple):
    """(log probability, whether greedy) of a continuation; `right` tells it token by token."""

    right: tuple[bool, ...]

    def __new__(cls, log_probability: float, right: Sequence[bool]) -> Likelihood:
        self = super().__new__(cls, (log_probability, all(right)))
        self.right = tuple(right)
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self[0], self.right


class SleepRequests:
    """Answers of lm-eval's request types; the base class after it, HFLM, does the rest.

    pretrained: a folder with a saved model of this package, or the model itself. sleep_passes:
        depth N of every sleep, or "auto"; None takes the config's. It may be set between calls.
    window, loop, eviction, sleep_attention: in place of the config's (folders only).
    tokenizer: in place of the folder's (see `load_tokenizer`); needed with a model.
    device, dtype: where and in what to compute (folders only); "auto" is the dtype saved.
    batch_size: rows read together, or "auto": as many, up to `max_batch_size`, as fit in memory.
    max_length: tokens of a text that are read, the last ones; None: `max_position_embeddings`.
    prefix_token_id: what stands before a text without context; None: the tokenizer's bos, or eos.

    No call leaves anything behind: each starts from empty memory. Raises ValueError or
    FileNotFoundError, naming the argument, for what is not allowed.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike | HybridSleepForCausalLM,
        sleep_passes: Passes | None = None,
        *,
        tokenizer: Any = None,
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int = LARGEST_BATCH,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        **sleep_options: Any,
    ):
        if batch_size != "auto" and (not str(batch_size).isdecimal() or int(batch_size) < 1):
            raise ValueError(f"batch_size={batch_size!r}; allowed: 'auto', or at least 1")
        check_count("max_batch_size", max_batch_size)
        if isinstance(pretrained, (str, os.PathLike)):
            folder = Path(pretrained)
            model = load_model(folder, device=device, dtype=dtype, sleep_options=sleep_options)
            tokenizer = tokenizer or load_tokenizer(folder, find_run(folder))
        else:
            model = pretrained
            if tokenizer is None or dtype != "auto" or sleep_options:
                raise ValueError(
                    f"pretrained is a model, given tokenizer={tokenizer!r}, dtype={dtype!r}, "
                    f"{sleep_options}; allowed: a tokenizer, and the model as it is"
                )
        self._first = Encoder(tokenizer).first
        with _unsaid("already-initialized model", "is not of type `str`"):
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                max_length=max_length,
                prefix_token_id=prefix_token_id,
            )
        self.sleep_passes = sleep_passes

    @property
    def sleep_passes(self) -> Passes:
        """Depth N of every sleep, or "auto"."""
        return self._passes

    @sleep_passes.setter
    def sleep_passes(self, passes: Passes | None) -> None:
        config = self.model.config
        passes = config.sleep_passes if passes is None else passes
        self._passes = config.check_passes(passes, "sleep_passes")

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context; ValueError if the model has no such token."""
        token, allowed = super().prefix_token_id, self.model.config.vocab_size
        if token is None or not 0 <= token < allowed:
            raise ValueError(
                f"prefix_token_id={token!r}, for a text without context before it; allowed: a "
                f"token of the model, 0..{allowed - 1}"
            )
        return token

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a text, behind a bos token where the tokenizer puts one; never an eos token.

        Raises ValueError for a word that the model has no token for.
        """
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False).input_ids
        unknown = next((i for i in ids if i >= self.model.config.vocab_size), None)
        if unknown is not None:
            raise ValueError(
                f"a text holds {self.tokenizer.convert_ids_to_tokens(unknown)!r}, token {unknown} "
                f"(text: {string[:60]!r}...); allowed: tokens 0.."
                f"{self.model.config.vocab_size - 1}, those of the model"
            )
        if add_special_tokens is not False and ids[:1] != self._first:
            ids = self._first + ids
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of several texts, `[B, T]` each; an empty one is the prefix token."""
        rows = [self.tok_encode(string) or [self.prefix_token_id] for string in strings]
        most = left_truncate_len or max(map(len, rows))
        if cut := sum(len(row) > most for row in rows):
            logger.warning("of %d prompts the last %d tokens are read (max_length)", cut, most)
        return pad([row[-most:] for row in rows], left=padding_side == "left")

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list:
        """Log probability of each text, its first token behind the prefix token."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        parts, places = [], []
        for place, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts += [(None, *make_disjoint_window(window)) for window in windows]
            places += [place] * (len(parts) - len(places))
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(parts, disable_tqdm=disable_tqdm)
        for place, answer in zip(places, answers, strict=True):
            totals[place] += answer[0]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Likelihood]:
        most = self.max_length + 1
        whole = [(context + continuation)[-most:] for _, context, continuation in requests]
        if cut := sum(len(context) + len(target) > most for _, context, target in requests):
            logger.warning("of %d texts the last %d tokens are read (max_length)", cut, most)
        for request, tokens in zip(requests, whole, strict=True):
            if not 0 < len(request[2]) < len(tokens):
                raise ValueError(
                    f"a continuation of {len(request[2])} tokens, {len(tokens)} with its context; "
                    f"allowed: at least one of each, {self.max_length + 1} in all (max_length)"
                )
        leaves = group_by_beginning([tokens[:-1] for tokens in whole])
        heads = {
            leaf: leaf[: min(len(whole[i]) - len(requests[i][2]) for i in members)]
            for leaf, members in leaves.items()
        }
        rows = side_by_side(heads)
        size = override_bs or self._rows_at_once(len(rows[0]) if rows else 1)
        answers: list[Any] = [None] * len(requests)
        done = 0
        with contextlib.ExitStack() as stack:
            progress = None if disable_tqdm else stack.enter_context(progress_bar("loglikelihood"))
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                hidden = self._read(batch, [heads[leaf] for leaf in batch])
                wanted = [(row, i) for row, leaf in enumerate(batch) for i in leaves[leaf]]
                places, targets = [], []
                for row, i in wanted:
                    tokens, count = whole[i], len(requests[i][2])
                    places += [(row, at) for at in range(len(tokens) - 1 - count, len(tokens) - 1)]
                    targets += tokens[-count:]
                scores, right = self._score(hidden, places, targets)
                at = 0
                for _, i in wanted:
                    end = at + len(requests[i][2])
                    answers[i] = Likelihood(float(scores[at:end].sum()), right[at:end].tolist())
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                    at = end
                done += len(wanted)
                if progress is not None:
                    progress(done, len(requests))
        return answers

    def _read(
        self, rows: Sequence[tuple[int, ...]], heads: Sequence[tuple[int, ...]]
    ) -> torch.Tensor:
        """Last hidden states `[B, T, D]` of rows of different lengths, each as if alone.

        heads: what each row begins with. One that several begin with is read, and slept on, once,
        where that saves a quarter of the work.
        """
        shared = list(dict.fromkeys(heads))
        tails = [row[len(head) :] for row, head in zip(rows, heads, strict=True)]
        once = len(shared) * max(map(len, shared)) + len(rows) * max(map(len, tails))
        if once > 0.75 * len(rows) * max(map(len, rows)):
            return self._backbone(rows).last_hidden_state
        out = self._backbone(shared, use_cache=True)
        place = [shared.index(head) for head in heads]
        out.cache.batch_select_indices(torch.tensor(place))
        begun = out.last_hidden_state
        rest = self._backbone(tails, cache=out.cache, use_cache=True)
        whole = begun.new_zeros(len(rows), max(map(len, rows)), begun.shape[2])
        for i, (row, head) in enumerate(zip(rows, heads, strict=True)):
            whole[i, : len(head)] = begun[place[i], : len(head)]
            whole[i, len(head) : len(row)] = rest.last_hidden_state[i, : len(tails[i])]
        return whole

    def _backbone(self, rows: Sequence[Sequence[int]], use_cache: bool = False, **kwargs: Any):
        ids, mask = pad(rows, left=False)
        return self.model.model(
            ids.to(self.device),
            attention_mask=mask,
            use_cache=use_cache,
            sleep_passes=self.sleep_passes,
            owner=self.model.memory_owner(),
            **kwargs,
        )

    def _score(
        self, hidden: torch.Tensor, places: list[tuple[int, int]], targets: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probability of each target at its (row, column), and whether it is the likeliest."""
        row, column = torch.tensor(places, device=hidden.device).T
        target = torch.tensor(targets, device=hidden.device)
        scores, right = [], []
        for part in torch.arange(len(targets)).split(
            max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        ):
            part = part.to(hidden.device)
            logits = self.model.lm_head(hidden[row[part], column[part]])
            right.append((logits.argmax(-1) == target[part]).cpu())
            # Log probabilities of long texts add up, and so would the rounding of bf16.
            logits = logits if logits.dtype == torch.float64 else logits.float()
            chosen = logits.log_softmax(-1).gather(1, target[part, None])
            scores.append(chosen[:, 0].double().cpu())
        return torch.cat(scores), torch.cat(right)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each prompt, up to the first of its stop sequences."""
        size = self.batch_size_per_gpu
        longest = max((len(self.tok_encode(request.args[0])) for request in requests), default=1)
        self.batch_size_per_gpu = self._rows_at_once(max(1, longest))
        try:
            return super().generate_until(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = size

    def _model_generate(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        *,
        do_sample: bool | None = None,
        temperature: float = 0.0,
        **generation_kwargs: Any,
    ) -> torch.Tensor:
        if do_sample or (do_sample is None and temperature > 0):
            generation_kwargs |= {"do_sample": True, "temperature": temperature}
        else:
            generation_kwargs["do_sample"] = False
        vocab_size, eos = self.model.config.vocab_size, self.model.generation_config.eos_token_id
        if eos is None and self.tokenizer.eos_token_id < vocab_size:
            eos = self.tokenizer.eos_token_id
        out = self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=stop_criteria(self.tokenizer, stop, context),
            # A masked token of the model's own vocabulary, which the tokenizer's need not be in.
            pad_token_id=0,
            eos_token_id=eos,
            use_cache=True,
            sleep_passes=self.sleep_passes,
            **generation_kwargs,
        )
        # What follows a stop sequence is cut off later; what follows the end of a text must not
        # show as words.
        new = out[:, context.shape[1] :]
        ends = torch.isin(new, torch.tensor([] if eos is None else eos, device=new.device))
        new[(ends.cumsum(1) - ends.int()) > 0] = self.tokenizer.pad_token_id
        return out

    def _rows_at_once(self, length: int) -> int:
        """The batch size; for "auto" the largest at which texts of `length` tokens fit."""
        if self.batch_size_per_gpu != "auto":
            return self.batch_size_per_gpu
        size = self.max_batch_size
        while True:
            try:
                with torch.no_grad():
                    self._backbone([[0] * length] * size)
                return size
            except RuntimeError as error:
                short = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
                if not short or size == 1:
                    raise
            size //= 2
            torch.cuda.empty_cache()


@functools.cache
def language_model() -> type:
    """The class `HybridSleepLM`, an HFLM, which lm-eval then knows as `hybrid_sleep`.

    Raises ValueError if lm_eval is not installed.
    """
    check_installed()
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    body = {"__doc__": SleepRequests.__doc__, "__module__": __name__}
    return register_model(NAME)(type("HybridSleepLM", (SleepRequests, HFLM), body))


@contextlib.contextmanager
def _unsaid(*texts: str) -> Iterator[None]:
    """Warnings of lm-eval's HFLM that hold one of `texts` are not shown.

    They are about how this module calls it, and nothing that a user could change.
    """

    def keeps(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in texts)

    named = logging.getLogger("lm_eval.models.huggingface")
    named.addFilter(keeps)
    try:
        yield
    finally:
        named.removeFilter(keeps)
