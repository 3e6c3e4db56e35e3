"""generate() for a model that sleeps: transformers' loop, each row at its own boundary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode
from transformers.utils.deprecation import deprecate_kwarg

from hybrid_sleep.sleep.arguments import check_tokens, refuse_unknown
from hybrid_sleep.sleep.cache import SleepCache
from hybrid_sleep.sleep.compiling import COMPILED_FROM
from hybrid_sleep.sleep.options import Passes, SleepOptions
from hybrid_sleep.sleep.prefix import without_read
from hybrid_sleep.sleep.weights import Owner

_MODES = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
}
_ROLLING_BACK = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "penalty_alpha",
    "dola_layers",
)
# What decides on the mode, see GenerationConfig.get_generation_mode.
_MODE_SETTINGS = (
    *_ROLLING_BACK[1:],
    "num_beams",
    "num_beam_groups",
    "do_sample",
    "top_k",
    "constraints",
    "force_words_ids",
)
_HANDED_ON = ("sleep_passes", "use_cache", "output_hidden_states")


class _Inputs(dict):
    """Inputs of a forward pass in which the cache also answers to its old name.

    peft (0.21) looks at what `prepare_inputs_for_generation` returns under that name alone, to tell
    whether its virtual tokens were processed; handed on with `**`, only the new name is there.
    """

    def __missing__(self, name: str) -> Any:
        if name == "past_key_values":
            return self["cache"]
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        return super().get("cache" if name == "past_key_values" else name, default)


class _Finished(StoppingCriteriaList):
    """Stopping criteria that tell the cache which rows are done and take no more tokens."""

    def __init__(self, criteria: Iterable[StoppingCriteria], cache: SleepCache):
        super().__init__(criteria)
        self.cache = cache

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        stopped = super().__call__(input_ids, scores, **kwargs)
        before = self.cache.finished
        self.cache.finished = stopped if before is None else before | stopped
        return stopped


class SleepGenerationMixin(GenerationMixin):
    """Greedy search, sampling and beam search with sleep; one forward pass a token.

    A row sleeps when a token arrives and its window is full. Rows of a batch, padded on the left
    or on the right, get what each would get alone; a row that is finished takes no further token.
    """

    _is_stateful = True

    if TYPE_CHECKING:
        # Of the model that this is a part of.
        config: Any

        @property
        def options(self) -> SleepOptions: ...

        @property
        def input_device(self) -> torch.device: ...

        def check_passes(self, passes: Any, name: str = "passes") -> Passes: ...

        def memory_owner(self) -> Owner: ...

        def get_input_embeddings(self) -> nn.Module: ...

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache", raise_if_both_names=True)
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ):
        """As transformers' `generate`, with these additions.

        sleep_passes: depth N of every sleep in this call, an integer of at least 1 or "auto";
            None takes the config's.
        cache: a `SleepCache` to continue; it goes on with this call (give a `copy()` to keep it).
            The prompt is either the new tokens alone, or the whole text: what the cache has
            processed of it is then left out. With beams or several returned sequences a repeated
            copy is used instead.

        disable_compile, compile_config: with the first True decode steps are never compiled, with
            the second given (a `CompileConfig()`) from the first one on; otherwise on a CPU, where
            at least 2000 new tokens may come. Compiling takes about a second a layer, once for each
            number of rows; `cache.decoding` says how the last step was run, and why.

        Raises ValueError for an empty prompt, an invalid depth, a cache of another model, config
        or weights version, a text that the cache knows otherwise, and for what cannot work:
        assisted decoding (fast weights cannot be rolled back), static, quantised or offloaded
        caches, chunked prefill (prompts are processed window by window already).
        """
        if kwargs.get("sleep_passes") is not None:
            self.check_passes(kwargs["sleep_passes"], "sleep_passes")
        setting = self._settings(generation_config, kwargs)
        self._check_settings(setting, kwargs)
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        tokens = ids if embeds is None else embeds
        cache = self._check_cache(kwargs.pop("cache", None))
        moved = None
        if tokens is not None:
            check_tokens(self.config, None if embeds is not None else ids, embeds)
            covers_past = mask is not None and mask.ndim == 2 and mask.shape[1] > tokens.shape[1]
            if mask is None and embeds is None:
                mask = self._mask_from_pads(ids, setting)
            if mask is not None:
                mask = self._check_mask(mask, tokens)
            if cache is not None and not covers_past:
                mask = without_read(self._embed, cache, tokens, mask)
            if mask is not None:
                if bool((mask[:, -1] == 0).any()):
                    moved = ids
                    order = pads_to_the_left(mask)
                    mask = mask.gather(1, order)
                    if embeds is None:
                        ids = ids.gather(1, order)
                    else:
                        kwargs["inputs_embeds"] = embeds.take_along_dim(order[..., None], dim=1)
                kwargs["attention_mask"] = mask
        cache = self._cache_for(setting, cache, embeds)
        if cache is not None:
            cache.compile = self._compiles(setting, tokens)
            # transformers would say that it compiles nothing.
            kwargs.pop("compile_config", None)
            if generation_config is not None and generation_config.compile_config is not None:
                generation_config = copy.copy(generation_config)
                generation_config.compile_config = None
            kwargs["cache"] = cache
            if setting("num_beams") in (None, 1):
                criteria = kwargs.get("stopping_criteria")
                kwargs["stopping_criteria"] = _Finished(criteria or (), cache)
        out = super().generate(ids, generation_config, **kwargs)
        if moved is not None and embeds is None:
            sequences = out if isinstance(out, torch.Tensor) else out.sequences
            copies = len(sequences) // len(moved)
            sequences[:, : moved.shape[1]] = moved.repeat_interleave(copies, 0)
        return out

    def _settings(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> Callable[[str], Any]:
        """What a setting of this call is: as an argument, in its config, or in the model's."""
        sources = (
            kwargs,
            {} if generation_config is None else vars(generation_config),
            vars(self.generation_config),
        )
        return lambda name: next((s[name] for s in sources if s.get(name) is not None), None)

    def _check_settings(self, setting: Callable[[str], Any], kwargs: dict[str, Any]) -> None:
        """Refuse, with the reason, what cannot work with fast weights."""
        config = GenerationConfig(**{k: setting(k) for k in _MODE_SETTINGS})
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        if mode not in _MODES:
            allowed = ", ".join(sorted(mode.value for mode in _MODES))
            asked_by = ", ".join(name for name in _ROLLING_BACK if setting(name))
            raise ValueError(
                f"{asked_by or 'the generation config'} asks for {mode.value}, which cannot work: "
                "it takes tokens back, and fast weights cannot be rolled back; allowed are "
                f"{allowed}"
            )
        if setting("prefill_chunk_size") is not None:
            raise ValueError(
                f"prefill_chunk_size={setting('prefill_chunk_size')} is not needed: "
                "a prompt is read window by window; leave it None"
            )
        if setting("cache_implementation") is not None:
            raise ValueError(
                f"cache_implementation={setting('cache_implementation')!r} cannot hold fast "
                "weights; leave it None, a SleepCache is constant in size"
            )
        refuse_unknown(self.config, {"output_attentions": setting("output_attentions")})

    def _check_cache(self, cache: SleepCache | None) -> SleepCache | None:
        if cache is None:
            return None
        if not isinstance(cache, SleepCache):
            raise ValueError(
                f"cache must be a SleepCache, got {type(cache).__name__}; this model's memory is "
                "its fast weights"
            )
        cache.check(self.memory_owner(), self.options)
        cache.check_finite()
        return cache

    def _cache_for(
        self,
        setting: Callable[[str], Any],
        cache: SleepCache | None,
        embeds: torch.Tensor | None,
    ) -> SleepCache | None:
        """What this call goes on with: the cache given, a copy for each beam, or a new one."""
        if cache is None:
            # Embeddings alone do not tell which tokens are new: transformers always caches there.
            unused = setting("use_cache") is False and embeds is None
            return None if unused else SleepCache(self.options)
        copies = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
        if copies > 1:
            cache = cache.copy()
            cache.batch_repeat_interleave(copies)
        cache.finished = None
        return cache

    def _compiles(self, setting: Callable[[str], Any], tokens: torch.Tensor | None) -> bool:
        """Whether the decode steps of this call are compiled, see `generate`."""
        if setting("disable_compile"):
            return False
        if setting("compile_config") is not None:
            return True
        new = setting("max_new_tokens")
        if new is None:
            read = 0 if tokens is None else tokens.shape[1]
            new = (setting("max_length") or 0) - read
        return self.input_device.type == "cpu" and new >= COMPILED_FROM

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.get_input_embeddings()(ids.to(self.input_device))

    def _check_mask(self, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The mask of the prompt's own columns; a longer one also covers what a cache has read."""
        batch, columns = tokens.shape[:2]
        if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < columns:
            raise ValueError(
                f"attention_mask must be [{batch}, {columns}], or longer where it covers the past "
                f"too, got {tuple(mask.shape)}"
            )
        mask = mask[:, -columns:]
        if bool((mask == 0).all(1).any()):
            raise ValueError(
                "attention_mask hides every token of at least one row: an empty prompt; each row "
                "needs at least one token, such as bos_token_id"
            )
        return mask

    def _mask_from_pads(
        self, ids: torch.Tensor, setting: Callable[[str], Any]
    ) -> torch.Tensor | None:
        """Transformers' rule: without a mask, pad tokens that are no eos tokens are pads."""
        pad, eos = setting("pad_token_id"), setting("eos_token_id")
        eos = eos if isinstance(eos, (list, tuple)) else [eos]
        if pad is None or pad in eos or not bool((ids == pad).any()):
            return None
        return (ids != pad).long()

    def _get_stopping_criteria(
        self, generation_config: Any, stopping_criteria: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # The only private method replaced: nothing else sees all criteria of a call together.
        parent: Any = super()
        criteria = parent._get_stopping_criteria(
            generation_config, stopping_criteria, *args, **kwargs
        )
        if isinstance(stopping_criteria, _Finished):
            return _Finished(criteria, stopping_criteria.cache)
        return criteria

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: SleepCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The prompt whole, then one token a step; a finished row's token is a pad."""
        if kwargs.get("position_ids") is not None:
            raise ValueError("position_ids cannot be given: a row's positions follow its windows")
        if kwargs.get("document_ids") is not None:
            raise ValueError("document_ids cannot be given: generate() goes on one text a row")
        inputs = _Inputs(cache=cache)
        if is_first_iteration:
            # generate() has hidden what a cache that came with the call has read already.
            first = 0
            if attention_mask is not None and cache is not None and cache.is_initialized:
                first = int((attention_mask != 0).any(0).nonzero()[0])
                attention_mask = attention_mask[:, first:]
            if inputs_embeds is not None:
                inputs["inputs_embeds"] = inputs_embeds[:, first:]
            else:
                inputs["input_ids"] = input_ids[:, first:]
            inputs["attention_mask"] = attention_mask
        elif cache is None:
            inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        else:
            inputs["input_ids"] = input_ids[:, -1:]
            done = cache.finished
            inputs["attention_mask"] = None if done is None else (~done)[:, None].long()
        inputs.update({k: v for k, v in kwargs.items() if k in _HANDED_ON})
        inputs["logits_to_keep"] = kwargs.get("logits_to_keep", 1)
        return inputs


def pads_to_the_left(mask: torch.Tensor) -> torch.Tensor:
    """Columns `[B, T]` in the order that puts pads in front and keeps the tokens' order."""
    return torch.argsort(mask.bool(), dim=1, stable=True)
