"""HybridSleepModel and HybridSleepForCausalLM."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hybrid_sleep.cache import SleepCache
from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.engine import SleepEngine
from hybrid_sleep.generation import SleepGenerationMixin
from hybrid_sleep.identity import Owner
from hybrid_sleep.layers.block import Block
from hybrid_sleep.layers.context import Context, see
from hybrid_sleep.layers.rotary import Rotary
from hybrid_sleep.layers.stack import Checkpointing, Granularity, parse_granularity
from hybrid_sleep.packing import (
    Documents,
    find_documents,
    next_labels_in_document,
    positions_in_document,
)
from hybrid_sleep.pretrained import HybridSleepPreTrainedModel
from hybrid_sleep.reading import read, read_documents
from hybrid_sleep.report import SleepReport
from hybrid_sleep.sleep import (
    MAX_PASSES,
    TOLERANCE,
    Passes,
    Truncation,
    check_passes,
    consolidate,
)
from hybrid_sleep.validation import check_count
from hybrid_sleep.windows import next_labels, real_tokens

_LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index")


class HybridSleepModel(HybridSleepPreTrainedModel):
    """The backbone: embeddings, blocks, final norm, and the loop of windows and sleeps.

    `engine` runs the passes of sleeps from CUDA graphs where it can; None turns it off, to measure.

    Raises ValueError, naming the argument, for token ids out of range, masks of another shape, a
    depth that is none, and a cache of another model, config or weights version.
    """

    def __init__(self, config: HybridSleepConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        distinct = config.distinct_layers or config.num_hidden_layers
        self.layers = nn.ModuleList(Block(config, i) for i in range(distinct))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.checkpointing = Checkpointing()
        self.truncation = Truncation()
        self.engine: SleepEngine | None = SleepEngine()
        self.post_init()

    @property
    def blocks(self) -> list[Block]:
        """The layers in the order in which they are applied, the same one again where shared."""
        distinct = len(self.layers)
        return [self.layers[i % distinct] for i in range(self.config.num_hidden_layers)]

    def _apply(self, *args: Any, **kwargs: Any) -> HybridSleepModel:
        # Graphs hold memory on the device that the parameters may be about to leave.
        if self.engine is not None:
            self.engine.forget()
        return super()._apply(*args, **kwargs)

    def check_tokens(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """The one of the two that is given; ValueError for both, none, a wrong shape, dtype or id.

        Ids of a single decoding step on an accelerator are trusted: looking would wait for it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        name, tokens = "input_ids [B, T]", input_ids
        width, floating = (), False
        if input_ids is None:
            name, tokens = f"inputs_embeds [B, T, {self.config.hidden_size}]", inputs_embeds
            width, floating = (self.config.hidden_size,), True
        if tokens.ndim != 2 + len(width) or tokens.shape[2:] != width:
            raise ValueError(f"{name} expected, got shape {tuple(tokens.shape)}")
        if 0 in tokens.shape:
            raise ValueError(
                f"{name} is an empty prompt, shape {tuple(tokens.shape)}; every row needs at least "
                "one token, such as bos_token_id"
            )
        if tokens.is_floating_point() != floating or tokens.dtype == torch.bool:
            raise ValueError(f"{name} must be integer ids or float embeddings, got {tokens.dtype}")
        if not floating and (tokens.device.type == "cpu" or tokens.shape[1] > 1):
            low, high = tokens.min().item(), tokens.max().item()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids must be token ids in 0..{self.config.vocab_size - 1}, got "
                    f"{low if low < 0 else high}"
                )
        return tokens

    def context(
        self,
        past: torch.Tensor,
        new: torch.Tensor,
        width: int,
        first_position: torch.Tensor,
        like: torch.Tensor,
        *,
        sleeping: bool,
    ) -> Context:
        """Positions and visibility of `new: [B]` tokens a row behind `past: [B]` slots.

        width: slots that the attention layers hold; first_position: `[B]`, position of the first
        new token; like: a tensor of the device and dtype to compute in; sleeping: passes 2..N.
        """
        tokens = int(new.max())
        device = like.device
        start = first_position
        if bool((start == start[0]).all()):
            start = start[:1]
        positions = start[:, None] + torch.arange(tokens)
        cos, sin = self.rotary(positions.to(device), like.dtype)
        sliding = self.config.eviction == "sliding"
        mask = None
        if not bool((new == tokens).all()):
            mask = (torch.arange(tokens) < new[:, None]).to(device)
        sight = see(
            past,
            new,
            width,
            reach=self.config.window if sliding else None,
            bidirectional=sleeping and self.config.sleep_attention == "bidirectional",
            device=device,
        )
        return Context(cos, sin, sight, mask, keep_tails=sliding or not sleeping)

    def _check_truncation(self, passes: Passes) -> None:
        kept = self.truncation.passes
        if passes == "auto" and kept is not None and torch.is_grad_enabled():
            raise ValueError(
                "sleep_passes='auto' learns of its last pass when it has run, so gradients cannot "
                f"be cut {kept} passes before it; give a number, or set_truncation(passes=None)"
            )

    def _check_documents(
        self,
        tokens: torch.Tensor,
        document_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past: SleepCache | None,
    ) -> Documents:
        if past is not None:
            raise ValueError(
                "document_ids starts each document with an empty memory, so past_key_values must "
                "be None"
            )
        if document_ids.shape != tokens.shape[:2]:
            raise ValueError(
                f"document_ids must be of the input's shape, {tuple(tokens.shape[:2])}, got "
                f"{tuple(document_ids.shape)}"
            )
        return find_documents(document_ids, attention_mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SleepCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        sleep_passes: Passes | None = None,
        supervised: torch.Tensor | None = None,
        columns_to_keep: int = 0,
        owner: Owner | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Read tokens window by window, sleeping wherever one arrives and its window is full.

        input_ids: `[B, T]`, or inputs_embeds: `[B, T, D]`. attention_mask: `[B, T]` or longer (the
        last T columns count), 0 at pads. supervised: bool `[B, T]`; under `context_windows` a
        window with a supervised token does not sleep. columns_to_keep: return hidden states of the
        last columns only; 0 for all. owner: whose cache it is, if not this module's own.
        document_ids: integers `[B, T]`; see `HybridSleepForCausalLM.forward`.

        Returns `last_hidden_state: [B, T, D]` (final norm applied, zeros at pads).
        """
        tokens = self.check_tokens(input_ids, inputs_embeds)
        passes = self.config.sleep_passes if sleep_passes is None else sleep_passes
        check_passes(passes, self.config, "sleep_passes")
        self._check_truncation(passes)
        batch, columns = tokens.shape[:2]
        documents = None
        if document_ids is not None:
            documents = self._check_documents(tokens, document_ids, attention_mask, past_key_values)
        if use_cache is None:
            use_cache = self.config.use_cache and documents is None
        real = real_tokens(attention_mask, batch, columns)
        cache = SleepCache(self.config) if past_key_values is None else past_key_values
        if not isinstance(cache, SleepCache):
            raise ValueError(f"past_key_values must be a SleepCache, got {type(cache).__name__}")
        if past_key_values is not None:
            cache.check(Owner.of(self) if owner is None else owner)
        elif use_cache:
            cache.owner = Owner.of(self) if owner is None else owner
        first = max(0, columns - columns_to_keep) if columns_to_keep else 0
        if documents is None:
            cache.open(batch)
            h = read(self, tokens, real, cache, passes, supervised=supervised, first=first)
        else:
            held = cache if use_cache else None
            h = read_documents(self, tokens, documents, held, passes, supervised=supervised)
            h = h[:, first:]
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(h),
            past_key_values=cache if use_cache else None,
        )


class HybridSleepForCausalLM(HybridSleepPreTrainedModel, SleepGenerationMixin):
    """The backbone with a language-modelling head: train it, let it sleep, generate with it."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridSleepConfig):
        super().__init__(config)
        self.model = HybridSleepModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_activation_checkpointing(self, granularity: Granularity | None) -> None:
        """Recompute activations in the backward instead of keeping them; None keeps all.

        granularity: what is recomputed as one. `"block"`: a layer; k >= 1: k consecutive layers of
            a pass; `"pass"`: all layers of a pass; `"window"`: a window with the sleep behind it,
            so that of what came before only what crosses a boundary is kept;
            `("window", "block" | k | "pass")`: a window, and within it again by layers, which
            costs one forward more than either. ValueError for anything else.

        Fast weights and short-term memory are passed explicitly, so results do not change.
        """
        layers = self.config.num_hidden_layers
        self.model.checkpointing = parse_granularity(granularity, layers)

    def set_truncation(self, passes: int | None = None, windows: int | None = None) -> None:
        """Truncate backpropagation, at least 1 each; None (default) cuts nothing.

        passes: through the last `passes` of the N passes of a sleep only. Those before run without
            gradients, and pass N - passes + 1 takes hidden states and fast weights from them as
            they are; pass 1 still learns from its own predictions. Gradients do reach what the
            window opened with where a kept pass, or the coda, starts from that again.
        windows: at every `windows`-th sleep of a row nothing that crosses the boundary, the coda's
            fast weights included, hands gradients back.

        Predictions and fast weights do not change.
        """
        for name, count in (("passes", passes), ("windows", windows)):
            if count is not None:
                check_count(name, count)
        self.model.truncation = Truncation(passes, windows)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SleepCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        sleep_passes: Passes | None = None,
        document_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict on pass 1, sleep at every full window; differentiable through every pass.

        input_ids: `[B, T]`; attention_mask: `[B, T]`, 0 at pads; labels: `[B, T]`, -100 where
        unsupervised, shifted inside. logits_to_keep: logits of the last columns only; 0 for all.
        sleep_passes: depth N of the sleeps in this call, None for the config's.

        With labels, `context_windows` (Algorithm 1) keeps windows that hold a supervised token
        awake, `every_window` lets them sleep after predicting; the loss is always pass 1's.
        Under no_grad sleeps are recorded in `past_key_values.reports`; with gradients they are not.

        document_ids: integers `[B, T]`; equal ids in adjacent columns are one document (-1, or 0 in
        attention_mask: a pad, which ends one). Each is read as if alone: from empty memory, in
        windows of its own, its last token predicting nothing. Needs past_key_values=None. With
        use_cache=True (default here: False) the new cache has a row per document, row by row in
        order of appearance; otherwise only documents of similar length are read side by side, so
        that padding costs at most a third more (`packing.Documents.by_length`).
        """
        unknown = [name for name, value in kwargs.items() if value and name not in _LOSS_ARGUMENTS]
        if unknown:
            raise ValueError(
                f"forward() does not take {', '.join(unknown)}: past_key_values counts positions "
                "and keeps states, and hidden states and attentions differ by window and pass"
            )
        loss_arguments = {k: v for k, v in kwargs.items() if k in _LOSS_ARGUMENTS}
        supervised = None
        if labels is not None:
            tokens = self.model.check_tokens(input_ids, inputs_embeds)
            self._check_labels(labels, tokens)
            if self.config.sleep_schedule == "context_windows":
                supervised = (labels != -100).cpu()
        check_count("logits_to_keep", logits_to_keep, minimum=0)
        if labels is not None and logits_to_keep:
            raise ValueError(
                f"logits_to_keep must be 0 where labels need every logit, got {logits_to_keep}"
            )
        outputs = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            sleep_passes=sleep_passes,
            supervised=supervised,
            columns_to_keep=logits_to_keep,
            owner=self.memory_owner(),
            document_ids=document_ids,
            return_dict=True,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            real = real_tokens(attention_mask, *labels.shape)
            if document_ids is not None:
                position = positions_in_document(document_ids, attention_mask).to(labels.device)
                loss_arguments["shift_labels"] = next_labels_in_document(labels, position)
            elif real is not None:
                loss_arguments["shift_labels"] = next_labels(labels, real)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_arguments
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )

    def _check_labels(self, labels: torch.Tensor, tokens: torch.Tensor) -> None:
        if labels.shape != tokens.shape[:2] or labels.is_floating_point():
            raise ValueError(
                f"labels must be integers of the input's shape, {tuple(tokens.shape[:2])}, got "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        wrong = (labels != -100) & ((labels < 0) | (labels >= self.config.vocab_size))
        if bool(wrong.any()):
            raise ValueError(
                f"labels must be -100 or token ids in 0..{self.config.vocab_size - 1}, got "
                f"{labels[wrong][0].item()}"
            )

    @torch.no_grad()
    def sleep(
        self,
        cache: SleepCache,
        passes: Passes | None = None,
        *,
        tol: float = TOLERANCE,
        max_passes: int = MAX_PASSES,
    ) -> SleepReport:
        """Sleep now, on whatever each row's window holds; the next token opens a new window.

        passes: depth N, pass 1 (the forward that filled the window) included; None takes the
            config's; "auto" stops, row by row, when a pass changes the looped fast weights by less
            than `tol` (relative, > 0), at the latest after `max_passes`.

        Computes no logits and writes no keys and values that are dropped anyway; with a fixed depth
        the last pass skips what no fast weight depends on. Empty windows change nothing. The
        report's `path` says whether the passes came from CUDA graphs, or why not.

        Raises ValueError for a depth that is none, a cache of another model, config or weights
        version, and fast weights that are not finite; the cache is then as it was.
        """
        passes = check_passes(self.config.sleep_passes if passes is None else passes, self.config)
        if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not tol > 0:
            raise ValueError(f"tol must be a number above 0, got {tol!r}")
        check_count("max_passes", max_passes)
        if not isinstance(cache, SleepCache):
            raise ValueError(f"cache must be a SleepCache, got {type(cache).__name__}")
        cache.check(self.memory_owner(), "cache")
        rows = torch.arange(len(cache.counts))
        return consolidate(self.model, cache, rows, passes, tol=tol, max_passes=max_passes)


AutoConfig.register("hybrid_sleep", HybridSleepConfig)
AutoModel.register(HybridSleepConfig, HybridSleepModel)
AutoModelForCausalLM.register(HybridSleepConfig, HybridSleepForCausalLM)
