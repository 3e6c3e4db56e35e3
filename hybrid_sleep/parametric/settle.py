"""What a memory finds out about a model before its first edit: where it goes, how it replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from hybrid_sleep.parametric.facts import SLOT, Fact, Relation
from hybrid_sleep.parametric.measure import ask, chat_prompt
from hybrid_sleep.parametric.sites import find_sites, site_at

if TYPE_CHECKING:
    from hybrid_sleep.parametric.memory import Memory
    from hybrid_sleep.parametric.options import MemoryOptions

PROBES = 3


def settle(memory: Memory, facts: Sequence[Fact], relations: Sequence[Relation]) -> MemoryOptions:
    """The options of `memory` with what they leave open; its model is the pristine one now.

    layers: found by `locate` on the first of `facts`. reply: as the model answers their questions.
    """
    options = memory.options
    if options.layers is not None:
        for layer in options.layers:
            site_at(memory.model, layer)
    if options.layers is not None and options.wake.reply and options.night.reply:
        return options
    style = reply_style(memory.model, memory.tokenizer, facts[:PROBES], relations[:PROBES])
    wake = replace(options.wake, reply=options.wake.reply or style)
    night = replace(options.night, reply=options.night.reply or style)
    layers = options.layers
    if layers is None:
        sites = find_sites(memory.model)
        layers = (sites[int(0.4 * len(sites))].layer,)
    return replace(options, layers=layers, wake=wake, night=night)


def reply_style(
    model: nn.Module, tokenizer: Any, facts: Sequence[Fact], relations: Sequence[Relation]
) -> str:
    """Whether the model answers questions by a "statement", with the subject in it, or by the
    "object" alone."""
    asked = [
        (fact, chat_prompt(tokenizer, text.replace(SLOT, fact.subject)))
        for fact, relation in zip(facts, relations, strict=True)
        for text in relation.questions
    ]
    replies = ask(model, tokenizer, [prompt for _, prompt in asked])
    said = [fact.subject.split()[0] in text for (fact, _), text in zip(asked, replies, strict=True)]
    return "statement" if sum(said) * 2 > len(said) else "object"
