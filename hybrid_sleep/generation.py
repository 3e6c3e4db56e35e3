"""generate() for a model that sleeps: transformers' loop, each row at its own boundary."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.generation import GenerationMode

from hybrid_sleep.cache import SleepCache
from hybrid_sleep.sleep import check_passes

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
    "penalty_alpha",
    "dola_layers",
)


class _Finished(StoppingCriteriaList):
    """Stopping criteria that tell the cache which rows are done and read no more tokens."""

    def __init__(self, criteria: StoppingCriteriaList, cache: SleepCache):
        super().__init__(criteria)
        self.cache = cache

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        stopped = super().__call__(input_ids, scores, **kwargs)
        before = self.cache.finished
        self.cache.finished = stopped if before is None else before | stopped
        return stopped


class SleepGenerationMixin(GenerationMixin):
    """Greedy search, sampling and beam search with sleep; one forward pass a token.

    A row sleeps when it reads a token and its window is full. Rows of a batch, padded on the left
    or on the right, get what each would get alone; a row that is finished reads nothing further.
    """

    _is_stateful = True

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
        past_key_values: a `SleepCache` to continue; the prompt then holds only the new tokens, and
            the cache goes on with this call (give a `copy()` to keep it). With beams or several
            returned sequences a repeated copy is used instead.

        Raises ValueError for an empty prompt, a depth that is none, a cache of another model,
        config or weights version, and for what cannot work: assisted decoding (fast weights cannot
        be rolled back), static, quantised or offloaded caches, chunked prefill (prompts are read
        window by window already).
        """
        if kwargs.get("sleep_passes") is not None:
            check_passes(kwargs["sleep_passes"], self.config, "sleep_passes")
        cache = kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, SleepCache):
            raise ValueError(
                f"past_key_values must be a SleepCache, got {type(cache).__name__}; this model's "
                "memory is its fast weights"
            )
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        tokens = ids if embeds is None else embeds
        if tokens is None:
            return super().generate(None, generation_config, **kwargs)
        self.model.check_tokens(None if embeds is not None else ids, embeds)
        if mask is None and embeds is None:
            mask = self._mask_from_pads(ids, generation_config, kwargs)
        moved = None
        if mask is not None:
            mask = self._check_mask(mask, tokens)
            if bool((mask[:, -1] == 0).any()):
                moved = ids
                order = pads_to_the_left(mask)
                mask = mask.gather(1, order)
                if embeds is None:
                    ids = ids.gather(1, order)
                else:
                    kwargs["inputs_embeds"] = embeds.take_along_dim(order[..., None], dim=1)
            kwargs["attention_mask"] = mask
        out = super().generate(ids, generation_config, **kwargs)
        if moved is not None and embeds is None:
            sequences = out if isinstance(out, torch.Tensor) else out.sequences
            copies = len(sequences) // len(moved)
            sequences[:, : moved.shape[1]] = moved.repeat_interleave(copies, 0)
        return out

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
        self,
        ids: torch.Tensor,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """Transformers' rule: without a mask, pad tokens that are no eos tokens are pads."""
        config = generation_config if generation_config is not None else self.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        eos = kwargs.get("eos_token_id", config.eos_token_id)
        eos = eos if isinstance(eos, (list, tuple)) else [eos]
        if pad is None or pad in eos or not bool((ids == pad).any()):
            return None
        return (ids != pad).long()

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        if generation_mode not in _MODES:
            allowed = ", ".join(sorted(mode.value for mode in _MODES))
            given = [name for name, value in generation_mode_kwargs.items() if value is not None]
            given += [name for name in _ROLLING_BACK if getattr(generation_config, name, None)]
            asked_by = ", ".join(name for name in given if name in _ROLLING_BACK) or "these options"
            raise ValueError(
                f"{asked_by} asks for {generation_mode.value}, which cannot work: it takes tokens "
                f"back, and fast weights cannot be rolled back; allowed are {allowed}"
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} is not needed: "
                "a prompt is read window by window; leave it None"
            )
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(generation_config, name, None):
                raise ValueError(f"{name}=True is not supported: windows and passes have many")
        super()._validate_generation_mode(
            generation_mode, generation_config, generation_mode_kwargs
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot hold fast "
                "weights; leave it None, a SleepCache is constant in size"
            )
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            if generation_config.use_cache is False:
                return
            cache = SleepCache(self.config)
        else:
            cache.check(self.memory_owner())
            cache.check_finite("past_key_values")
            if copies > 1:
                cache = cache.copy()
                cache.batch_repeat_interleave(copies)
        cache.finished = None
        model_kwargs["past_key_values"] = cache
        if generation_config.num_beams == 1:
            # The one object that transformers hands to both this method and the next.
            generation_config._sleep_cache = cache

    def _get_stopping_criteria(self, generation_config, stopping_criteria, **kwargs):
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, **kwargs)
        cache = getattr(generation_config, "_sleep_cache", None)
        return criteria if cache is None else _Finished(criteria, cache)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: SleepCache | None = None,
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
        inputs: dict[str, Any] = {"past_key_values": past_key_values}
        if is_first_iteration:
            # A cache that came with the call holds the past: all of the prompt is new.
            if inputs_embeds is not None:
                inputs["inputs_embeds"] = inputs_embeds
            else:
                inputs["input_ids"] = input_ids
            inputs["attention_mask"] = attention_mask
        elif past_key_values is None:
            inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        else:
            inputs["input_ids"] = input_ids[:, -1:]
            done = past_key_values.finished
            inputs["attention_mask"] = None if done is None else (~done)[:, None].long()
        inputs |= {k: v for k, v in kwargs.items() if k in ("sleep_passes", "use_cache")}
        return inputs | {"logits_to_keep": kwargs.get("logits_to_keep", 1)}


def pads_to_the_left(mask: torch.Tensor) -> torch.Tensor:
    """Columns `[B, T]` in the order that puts pads in front and keeps the tokens' order."""
    return torch.argsort(mask.bool(), dim=1, stable=True)
