"""What a night is trained on, small, and the folder that it leaves."""

from __future__ import annotations

import os
import signal
from types import MappingProxyType, SimpleNamespace

import experiences
import torch
from editable import VOCAB

from hybrid_sleep.parametric.ewc import L2
from hybrid_sleep.parametric.experience.choice import Chosen
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.experience.unfinished import Unfinished
from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.parametric.lessons import Lesson, taught
from hybrid_sleep.parametric.mix import Row

STUDY = StudyOptions(rows=3, rate=0.01, tokens=64)
CONTEXT = (5, 6, 7)


def lessons(model, count=11, seed=0):
    """Rows of many lengths and two weights, every other one with the model as its teacher."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, (4 + i % 3,), generator=g).tolist()
        made.append(Lesson("recent", Row(tuple(ids), 1 + i % 2, 1.5 if i % 4 == 0 else 1.0)))
    asked = made[::2]
    told = taught(model, asked, reads=[(*CONTEXT, *x.ids) for x in asked])
    made[::2] = told
    return made


def guard_of(model, strength=30.0):
    guard = L2(model, strength)
    guard.consolidate()
    return guard


def press_at(number):
    """A progress that interrupts behind a step."""

    def progress(step, steps):
        if step == number:
            os.kill(os.getpid(), signal.SIGINT)

    return progress


def close(one, other):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-11, msg=name)


@torch.no_grad()
def says(model, token):
    """Make `model` say `token` and nothing else, whatever it reads."""
    model.model.embed_tokens.weight.fill_(1.0)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(1.0)
    model.lm_head.weight.zero_()[token] = 100.0


def expected(model, ids, tokens, cache=None):
    """Log probabilities of the last `tokens` of `ids`, behind `cache`."""
    past = {"use_cache": False} if cache is None else {"cache": cache.copy()}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), **past).logits[0]
    return logits.log_softmax(-1)[-tokens - 1 : -1]


class Folder:
    """A buffer of experiences of two sources, and what nights over them leave in its folder."""

    def __init__(self, path):
        self.path = path
        self.store, self.buffer = experiences.opened(path)
        if not self.buffer.ids():
            for source, words in (("ada", "The meeting moved."), ("bo", "Lisbon is by the sea.")):
                self.buffer.add(experiences.text(words, source), [1.0])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.store.close()

    def night(
        self, *, options=STUDY, questions=(), seed=0, weights="w", corpus=None, ids=None, words=(),
        prompts=MappingProxyType({}), semantic=None,
    ):  # fmt: skip
        kept = self.buffer.experiences()
        kept = tuple(x for x in kept if ids is None or x.id in ids)
        memory = SimpleNamespace(
            folder=self.path, buffer=self.buffer, corpus=corpus,
            edited=SimpleNamespace(digest=lambda: weights),
            facts=lambda states: [SimpleNamespace(fact=Fact("Ada", x.name, "Rome")) for x in words],
            relation=lambda name: next(x for x in words if x.name == name),
        )  # fmt: skip
        chosen = Chosen(kept, (1.0,) * len(kept), sum(len(x.ids) for x in kept))
        return Unfinished(
            memory, chosen, options, questions, seed, prompts=prompts, semantic=semantic
        )
