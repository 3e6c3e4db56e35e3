"""HybridSleepModel and HybridSleepForCausalLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.layers.block import Block
from hybrid_sleep.layers.context import Context
from hybrid_sleep.layers.embedding import CompoundEmbedding
from hybrid_sleep.layers.rotary import Rotary
from hybrid_sleep.layers.stack import NOT_COMPILED, Stack
from hybrid_sleep.pretrained import HybridSleepPreTrainedModel
from hybrid_sleep.registration import register_with_transformers
from hybrid_sleep.sleep.algorithm import consolidate
from hybrid_sleep.sleep.arguments import (
    check_labels,
    check_tokens,
    documents_given,
    refuse_unknown,
)
from hybrid_sleep.sleep.cache import SleepCache
from hybrid_sleep.sleep.checkpointing import (
    Checkpointing,
    Granularity,
    Truncation,
    parse_granularity,
)
from hybrid_sleep.sleep.compiling import StepCompiler
from hybrid_sleep.sleep.decoding import decode
from hybrid_sleep.sleep.documents import (
    find_documents,
    next_labels_in_document,
    positions_in_document,
)
from hybrid_sleep.sleep.execution import SleepEngine, is_hooked
from hybrid_sleep.sleep.forward import check_supervised, forward, forward_documents
from hybrid_sleep.sleep.generation import SleepGenerationMixin
from hybrid_sleep.sleep.masks import build_mask, decoding_mask
from hybrid_sleep.sleep.options import MAX_PASSES, TOLERANCE, Depths, Passes
from hybrid_sleep.sleep.report import SleepReport
from hybrid_sleep.sleep.weights import Owner
from hybrid_sleep.sleep.windows import next_labels, real_tokens
from hybrid_sleep.validation import check_count, check_number

_LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index")


class HybridSleepModel(Stack, HybridSleepPreTrainedModel):
    """The backbone (`sleep.backbone.Backbone`): embeddings, blocks, final norm, windows and sleeps.

    `engine` runs the passes of sleeps from CUDA graphs where it can, `compiler` compiles decode
    steps where generate() wants it; None turns either off, to measure.

    Raises ValueError, naming the argument, for token ids out of range, masks of another shape, an
    invalid depth, and a cache of another model, config or weights version.
    """

    def __init__(self, config: HybridSleepConfig):
        super().__init__(config)
        self.embed_tokens: nn.Module = (
            nn.Embedding(config.vocab_size, config.hidden_size)
            if config.token_fields is None
            else CompoundEmbedding(config.token_fields, config.hidden_size)
        )
        distinct = config.distinct_layers or config.num_hidden_layers
        self.layers = nn.ModuleList(Block(config, i) for i in range(distinct))
        looped = range(*config.loop_range)
        self.later_layers = nn.ModuleList(
            Block(config, i) for _ in range(1, config.distinct_passes) for i in looped
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.checkpointing = Checkpointing()
        self.truncation = Truncation()
        self.engine: SleepEngine | None = SleepEngine()
        self.compiler: StepCompiler | None = StepCompiler()
        self.post_init()

    def _apply(self, *args: Any, **kwargs: Any) -> HybridSleepModel:
        # Graphs hold memory on the device that the parameters may be about to leave.
        if self.engine is not None:
            self.engine.forget()
        return super()._apply(*args, **kwargs)

    @property
    def fast_weight_layers(self) -> list[int]:
        """Indices of the state-space layers."""
        return self.config.fast_weight_layers

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, T, D]` of ids `[B, T]`."""
        return self.embed_tokens(tokens)

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
        """Positions and masks of `new` tokens a row, see `Backbone.context`."""
        tokens, device, options = int(new.max()), like.device, self.options
        start = first_position
        if bool((start == start[0]).all()):
            start = start[:1]
        positions = start[:, None] + torch.arange(tokens)
        cos, sin = self.rotary(positions.to(device), like.dtype)
        mask = None
        if not bool((new == tokens).all()):
            mask = (torch.arange(tokens) < new[:, None]).to(device)
        attention = build_mask(
            past,
            new,
            width,
            reach=options.reach,
            # Passes 2..N predict nothing, so no token gives its own label away.
            bidirectional=sleeping and options.attention == "bidirectional",
            device=device,
        )
        return Context(cos, sin, attention, mask, keep_tails=options.is_sliding or not sleeping)

    def decoding_context(
        self,
        place: torch.Tensor,
        position: torch.Tensor,
        width: int,
        active: torch.Tensor | None,
        like: torch.Tensor,
    ) -> Context:
        """Positions and masks of one token a row, see `DecodesInPlace`."""
        cos, sin = self.rotary(position[:, None], like.dtype)
        attention = decoding_mask(place, width, reach=self.options.reach)
        return Context(cos, sin, attention, active, keep_tails=True)

    def _check_depths(self, passes: Any, rows: int) -> Depths:
        """`passes` as a sleep of this model takes it; of several, one for each group of `rows`."""
        if isinstance(passes, tuple):
            for i, depth in enumerate(passes):
                check_count(f"sleep_passes[{i}]", depth)
            if not passes or rows % len(passes):
                raise ValueError(
                    f"sleep_passes must be a depth, or a tuple whose length divides the {rows} "
                    f"rows of input_ids, one depth for each group of them, got {passes!r}"
                )
            return passes
        self._check_truncation(self.check_passes(passes, "sleep_passes"))
        return passes

    def _check_truncation(self, passes: Passes) -> None:
        kept = self.truncation.passes
        if passes == "auto" and kept is not None and torch.is_grad_enabled():
            raise ValueError(
                "sleep_passes='auto' learns of its last pass when it has run, so gradients cannot "
                f"be cut {kept} passes before it; give a number, or set_truncation(passes=None)"
            )

    @torch.compiler.disable(reason=NOT_COMPILED)
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: SleepCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        sleep_passes: Depths | None = None,
        supervised: torch.Tensor | None = None,
        columns_to_keep: int = 0,
        owner: Owner | None = None,
        document_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Pass 1 over tokens, window by window, with a sleep where one finds its window full.

        input_ids: `[B, T]`, or inputs_embeds: `[B, T, D]`. attention_mask: `[B, T]` or longer (the
        last T columns count), 0 at pads. supervised: bool `[B, T]`; under `context_windows` a
        window with a supervised token does not sleep, whoever computes the loss; no effect under
        `every_window`. columns_to_keep: return hidden states of the last columns only; 0 for all.
        owner: whose cache it is, if not this module's own.
        document_ids, position_ids, output_hidden_states: see `HybridSleepForCausalLM.forward`.

        Returns `last_hidden_state: [B, T, D]` (final norm applied, zeros at pads).
        """
        position_ids = kwargs.pop("position_ids", None)
        refuse_unknown(self.config, kwargs)
        tokens = check_tokens(self.config, input_ids, inputs_embeds)
        passes = self.config.sleep_passes if sleep_passes is None else sleep_passes
        passes = self._check_depths(passes, len(tokens))
        supervised = check_supervised(self, supervised, tokens, passes)
        batch, columns = tokens.shape[:2]
        if cache is not None and not isinstance(cache, SleepCache):
            raise ValueError(f"cache must be a SleepCache, got {type(cache).__name__}")
        document_ids = documents_given(tokens, document_ids, position_ids, attention_mask, cache)
        documents = None
        if document_ids is not None:
            if isinstance(passes, tuple):
                raise ValueError(
                    "sleep_passes must be one depth where rows hold several documents, got "
                    f"{passes!r}"
                )
            documents = find_documents(document_ids, attention_mask)
        if use_cache is None:
            use_cache = self.config.use_cache and documents is None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        real = real_tokens(attention_mask, batch, columns)
        held = SleepCache(self.options) if cache is None else cache
        if cache is not None or use_cache:
            # A new cache has no owner yet, and one that is not returned needs none.
            held.check(Owner.of(self) if owner is None else owner, self.options)
        some = columns_to_keep and not output_hidden_states
        first = max(0, columns - columns_to_keep) if some else 0
        every_layer = bool(output_hidden_states)
        if documents is None:
            held.open(batch)
            h = forward(
                self,
                tokens,
                real,
                held,
                passes,
                supervised=supervised,
                every_layer=every_layer,
                first=first,
            )
        else:
            one = held if use_cache else None
            h = forward_documents(
                self,
                tokens,
                documents,
                one,
                passes,
                supervised=supervised,
                every_layer=every_layer,
            )[:, first:]
        *hidden_states, h = h.split(self.config.hidden_size, dim=-1)
        h = self.norm(h)
        return BaseModelOutputWithPast(
            last_hidden_state=h,
            cache=held if use_cache else None,
            hidden_states=(*hidden_states, h) if output_hidden_states else None,
        )


class HybridSleepForCausalLM(HybridSleepPreTrainedModel, SleepGenerationMixin):
    """The backbone with a language-modelling head: train it, let it sleep, generate with it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

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

        States are passed explicitly, so results do not change.
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

    @torch.compiler.disable(reason=NOT_COMPILED)
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: SleepCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        sleep_passes: Depths | None = None,
        document_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        supervised: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict on pass 1, sleep at every full window; differentiable through every pass.

        input_ids: `[B, T]`; attention_mask: `[B, T]`, 0 at pads; labels: `[B, T]`, -100 where
        unsupervised, shifted inside. logits_to_keep: logits of the last columns only; 0 for all;
        with labels, all that they need.
        cache: a `SleepCache` to go on with; all tokens of this call are new to it.
        sleep_passes: depth N of the sleeps in this call, None for the config's; or a tuple of K
        depths, one for each of K groups of equally many rows, one below the other. Where training
        groups begin with the same window (one text, asked at several depths), its passes run once.

        supervised: bool `[B, T]`, tokens that a loss is computed on; default: `labels != -100`,
        without labels none. Under `context_windows` (Algorithm 1) a window that holds one is not
        consolidated, under `every_window` it is, after predicting; the loss is always pass 1's.
        Under no_grad sleeps are recorded in `cache.reports`; with gradients they are not.

        document_ids: integers `[B, T]`; equal ids in adjacent columns are one document (-1, or 0 in
        attention_mask: a pad, which ends one). Each is processed as if alone: from a new cache, in
        windows of its own, its last token predicting nothing. Needs cache=None. With
        use_cache=True (default here: False) the new cache has a row per document, row by row in
        order of appearance; otherwise only documents of similar length share a batch, so
        that padding costs at most a third more (`Documents.by_length`).
        position_ids (among the other keywords, `[B, T]` or `[1, T]`): where they start again at 0
        a document starts; otherwise they must be the positions that the tokens have anyway.
        output_hidden_states: return those of pass 1, `[B, T, D]` each: the embeddings, what each
        layer but the last gives, and `last_hidden_state`. None takes the config's.
        """
        others = (inputs_embeds, labels, document_ids, supervised, *kwargs.values())
        if isinstance(cache, SleepCache) and logits_to_keep in (0, 1):
            keeps = self.config.use_cache if use_cache is None else use_cache
            shows = output_hidden_states
            shows = self.config.output_hidden_states if shows is None else shows
            if keeps and not shows and all(x is None for x in others):
                logits = self._decode(input_ids, attention_mask, cache, sleep_passes)
                if logits is not None:
                    return CausalLMOutputWithPast(logits=logits, cache=cache)
        loss_arguments = {k: kwargs.pop(k) for k in _LOSS_ARGUMENTS if k in kwargs}
        position_ids = kwargs.pop("position_ids", None)
        if any(x is not None for x in (labels, document_ids, position_ids)):
            # Without them the backbone's own check is enough, and on a GPU each one waits for it.
            tokens = check_tokens(self.config, input_ids, inputs_embeds)
            document_ids = documents_given(
                tokens, document_ids, position_ids, attention_mask, cache
            )
        if labels is not None:
            check_labels(self.config, labels, tokens)
            if supervised is None:
                supervised = labels != -100
        check_count("logits_to_keep", logits_to_keep, minimum=0)
        if labels is not None and logits_to_keep:
            # A label is predicted one column before it, or more where pads lie between.
            unseen = labels[:, : max(0, labels.shape[1] - logits_to_keep + 1)]
            moved = attention_mask is not None or document_ids is not None
            if moved or bool((unseen != -100).any()):
                raise ValueError(
                    "logits_to_keep must be 0 where labels need every logit, and with labels and "
                    f"attention_mask, document_ids or position_ids, got {logits_to_keep}"
                )
        outputs = self.model(
            input_ids,
            attention_mask,
            cache,
            inputs_embeds,
            use_cache=use_cache,
            sleep_passes=sleep_passes,
            supervised=supervised,
            columns_to_keep=logits_to_keep,
            owner=self.memory_owner(),
            document_ids=document_ids,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            real = real_tokens(attention_mask, *labels.shape)
            if document_ids is not None:
                position = positions_in_document(document_ids, attention_mask).to(labels.device)
                loss_arguments["shift_labels"] = next_labels_in_document(labels, position)
            elif real is not None:
                loss_arguments["shift_labels"] = next_labels(labels, real)
            loss = self.loss_function(
                logits=logits,
                labels=labels[:, -logits_to_keep:],
                vocab_size=self.config.vocab_size,
                **loss_arguments,
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )

    def _decode(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: SleepCache,
        sleep_passes: Depths | None,
    ) -> torch.Tensor | None:
        """Logits `[B, 1, V]` of one token a row, decoded in place; None where `forward` goes on.

        Its checks, without those of what such a call does not have: for a small model all of them
        cost as much as the step.
        """
        if not (cache.single or cache.decoder is not None):
            return None
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] != 1:
            return None
        if is_hooked(self.model):
            return None
        refuse_unknown(self.config, {})
        rows = len(check_tokens(self.config, input_ids, None))
        self.model._check_depths(
            self.config.sleep_passes if sleep_passes is None else sleep_passes, rows
        )
        real = real_tokens(attention_mask, rows, 1)
        cache.check(self.memory_owner(), self.options)
        cache.open(rows)
        return decode(self.model, cache, input_ids, real, finish=self._logits)

    def _logits(self, h: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model.norm(h))

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

        Raises ValueError for an invalid depth, a cache of another model, config or weights
        version, and fast weights that are not finite; the cache is then as it was.
        """
        passes = self.check_passes(self.config.sleep_passes if passes is None else passes)
        check_number("tol", tol, above=0)
        check_count("max_passes", max_passes)
        if not isinstance(cache, SleepCache):
            raise ValueError(f"cache must be a SleepCache, got {type(cache).__name__}")
        cache.check(self.memory_owner(), self.options)
        rows = torch.arange(len(cache.counts))
        return consolidate(self.model, cache, rows, passes, tol, max_passes)


register_with_transformers(HybridSleepModel, HybridSleepForCausalLM)
