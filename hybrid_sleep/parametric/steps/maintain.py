"""Step 4: all facts that are kept, solved for together from the pristine weights, and refined."""

from __future__ import annotations

from hybrid_sleep.parametric.edit import Edit, Plan, plan_facts, solve_plan
from hybrid_sleep.parametric.refine import refine
from hybrid_sleep.parametric.steps.night import Night

STILL_LOST = 0.69  # nats a token: the object has less than half of the probability
HARDER = 2.0


def plan(night: Night) -> Plan:
    """v* of all facts, with the pristine weights in place; those that are hard get a second try.

    A fact that even v* itself does not make likely cannot be held at this site: it is quarantined,
    rather than paid for by the others.
    """
    memory, options = night.memory, night.memory.options.night
    site = memory.sites[-1]
    first = plan_facts(
        memory.model, memory.tokenizer, night.live, site, options, night.told("maintain")
    )
    losses = first.losses()
    hard = [x for x in night.live if losses[x[0]] > STILL_LOST]
    if hard:
        harder = options.harder(HARDER)
        again = plan_facts(
            memory.model, memory.tokenizer, hard, site, harder, night.told("maintain")
        )
        first = first.updated(again)
    limit = options.hopeless
    for number, loss in first.losses().items():
        if loss > limit:
            night.quarantined[number] = (
                f"{site.name} cannot hold it: its loss stays at {loss:.2f} nats a token, "
                f"above {limit:g}"
            )
    return first


def maintain(night: Night, planned: Plan, strength: float) -> Edit | None:
    """Put the joint solution at `strength` times the night's weight into the weights.

    None where no fact is left: the weights are then the pristine ones.
    """
    memory = night.memory
    memory.edited.materialise([])
    kept = {number for number, _, _ in night.live}
    if not kept:
        return None
    preconditioners = memory.preconditioners(memory.options.night, strength)
    live = planned.only(kept)
    solved = solve_plan(memory.model, live, preconditioners)
    refined = refine(
        memory.model, memory.tokenizer, live, solved,
        {site: of.spectrum for site, of in memory.statistics().items()}, memory.texts(),
        memory.options.refine, strength=strength, seed=memory.options.seed,
        progress=night.told("refine"),
    )  # fmt: skip
    edit = memory.agreed(refined)
    memory.edited.materialise([edit.factors])
    return edit
