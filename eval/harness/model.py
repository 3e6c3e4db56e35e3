"""The model that lm-eval calls `hybrid_sleep`: an adapter from its requests to a sleeping model.

lm-eval's own adapter for transformers would do, but for three things. It pads texts on the right
with token 0 and no mask, so that pads fill windows and are consolidated. It lets tokenizers add
what they like, and some add an end of text to every prompt. And it computes a text again for each
continuation, and for each label of one example. Here a batch has its mask, prompts never end, and
`likelihood.py` computes once what several requests share.
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

from hybrid_sleep.eval.harness.batches import pad
from hybrid_sleep.eval.harness.likelihood import Likelihood, likelihoods
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

logger = logging.getLogger(__name__)


class SleepRequests:
    """lm-eval's request types; the base class after it, HFLM, does the rest.

    pretrained: a folder with a saved model of this package, or the model itself. sleep_passes:
        depth N of every sleep, or "auto"; None takes the config's. It may be set between calls.
    window, loop, eviction, sleep_attention, sleep_carry: in place of the config's (folders only).
    tokenizer: in place of the folder's (see `load_tokenizer`); needed with a model.
    device, dtype: where and in what to compute (folders only); "auto" is the dtype saved.
    batch_size: rows of a batch, or "auto": as many, up to `max_batch_size`, as fit in memory.
    max_length: a longer text is truncated to its last tokens; None: `max_position_embeddings`.
    prefix_token_id: what precedes a text without context; None: the tokenizer's bos, or eos.

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
            raise ValueError(
                f"batch_size must be 'auto' or an integer of at least 1, got {batch_size!r}"
            )
        check_count("max_batch_size", max_batch_size)
        if isinstance(pretrained, (str, os.PathLike)):
            folder = Path(pretrained)
            model = load_model(folder, device=device, dtype=dtype, sleep_options=sleep_options)
            tokenizer = tokenizer or load_tokenizer(folder, find_run(folder))
        else:
            model = pretrained
            if tokenizer is None or dtype != "auto" or sleep_options:
                raise ValueError(
                    "a model as `pretrained` must be given with a tokenizer, and is taken as it "
                    f"is, got tokenizer={tokenizer!r}, dtype={dtype!r}, {sleep_options}"
                )
        self._first = Encoder(tokenizer).first
        with _without_warnings("already-initialized model", "is not of type `str`"):
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
        """What precedes a text without context; ValueError if the model has no such token."""
        token, size = super().prefix_token_id, self.model.config.vocab_size
        if token is None or not 0 <= token < size:
            raise ValueError(
                f"prefix_token_id, for a text without context, must be a token of the model, "
                f"0..{size - 1}, got {token!r}"
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
                f"a text must have tokens of the model, 0..{self.model.config.vocab_size - 1}, got "
                f"{self.tokenizer.convert_ids_to_tokens(unknown)!r}, token {unknown}, in "
                f"{string[:60]!r}"
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
            logger.warning("%d prompts truncated to their last %d tokens (max_length)", cut, most)
        return pad([row[-most:] for row in rows], left=padding_side == "left")

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list:
        """Log probability of each text, its first token given the prefix token."""
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

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Likelihood]:
        most = self.max_length + 1
        whole = [(context + target)[-most:] for _, context, target in requests]
        if cut := sum(len(context) + len(target) > most for _, context, target in requests):
            logger.warning("%d texts truncated to their last %d tokens (max_length)", cut, most)
        for (_, _, target), tokens in zip(requests, whole, strict=True):
            if not 0 < len(target) < len(tokens):
                raise ValueError(
                    "a continuation and its context must have at least one token each and at most "
                    f"{most} together (max_length), got {len(target)} of {len(tokens)} tokens"
                )
        scored = likelihoods(
            [(tokens, len(target)) for (_, _, target), tokens in zip(requests, whole, strict=True)],
            self._backbone,
            self.model.lm_head,
            lambda longest: override_bs or self._rows_at_once(longest),
        )
        answers: dict[int, Likelihood] = {}
        bar = contextlib.nullcontext() if disable_tqdm else progress_bar("loglikelihood")
        with bar as progress:
            for batch in scored:
                answers.update(batch)
                for i, answer in batch:
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                if progress is not None:
                    progress(len(answers), len(requests))
        return [answers[i] for i in range(len(requests))]

    def _backbone(
        self, rows: Sequence[Sequence[int]], use_cache: bool = False, **kwargs: Any
    ) -> Any:
        """The backbone's output for rows of different lengths, padded on the right."""
        ids, mask = pad(rows, left=False)
        return self.model.model(
            ids.to(self.device),
            attention_mask=mask,
            use_cache=use_cache,
            sleep_passes=self.sleep_passes,
            owner=self.model.memory_owner(),
            **kwargs,
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model generates after each prompt, up to the first of its stop sequences."""
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
            stopping_criteria=_stop_criteria(self.tokenizer, stop, context),
            # A masked token of the model's own vocabulary, which the tokenizer's need not be in.
            pad_token_id=0,
            eos_token_id=eos,
            use_cache=True,
            sleep_passes=self.sleep_passes,
            **generation_kwargs,
        )
        # lm-eval cuts off what follows a stop sequence, but not what a row whose text has ended is
        # filled with, and 0 may be a word.
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


def _stop_criteria(tokenizer: Any, stop: Sequence[str], context: torch.Tensor) -> Any:
    """lm-eval's stop sequences, but a row ends as soon as its own has come, not with the last."""
    from lm_eval.models.utils_hf import MultiTokenEOSCriteria
    from transformers import StoppingCriteriaList

    class RowStops(MultiTokenEOSCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            super().__call__(input_ids, scores, **kwargs)
            return torch.tensor(self.done_tracker, device=input_ids.device)

    width = context.shape[1]
    return StoppingCriteriaList([RowStops(x, tokenizer, width, len(context)) for x in stop])


@contextlib.contextmanager
def _without_warnings(*texts: str) -> Iterator[None]:
    """Hide warnings of lm-eval's HFLM that contain one of `texts`.

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
