"""Sleep: N passes over a full window, then everything but the fast weights is dropped.

Lee, McLeish, Goldstein, Fanti, "Do Language Models Need Sleep?", arXiv 2605.26099, Algorithm 1.
The ordinary forward pass over the window was pass 1, so a sleep of depth N runs passes 2..N:

    h, S <- pass 1                                               the cache kept them
    repeat for pass 2..N:  h, S <- LoopedBlocks(h, S)            looped_pass
    S of the coda <- S at the window's start;  S <- Coda(h, S)   coda
    drop keys, values, hidden states, convolution tails          cache.cross_boundary

For one row, token by token and with nothing left out, the same is in `minimal.py`.
"""

from __future__ import annotations

import time

import torch

from hybrid_sleep.sleep import execution, report
from hybrid_sleep.sleep.backbone import Backbone
from hybrid_sleep.sleep.cache import SleepCache, Window
from hybrid_sleep.sleep.carry import Carry, Outcome, after_pass_one, after_passes, writer_of
from hybrid_sleep.sleep.options import MAX_PASSES, TOLERANCE, Passes, check_passes
from hybrid_sleep.sleep.state import LayerState


def consolidate(
    backbone: Backbone,
    cache: SleepCache,
    rows: torch.Tensor,
    passes: Passes,
    tol: float = TOLERANCE,
    max_passes: int = MAX_PASSES,
) -> report.SleepReport:
    """Let `rows` (ascending, on the CPU) sleep and open a new window; rows without tokens stay.

    passes: depth N; 1 only evicts. "auto" ends, row by row, with the first pass that changes the
    looped fast weights by less than `tol`, at the latest after `max_passes`.

    Without gradients the change is measured and the report recorded in the cache; ValueError, with
    the cache as it was, where fast weights are not finite before or after.
    """
    began, learns = time.perf_counter(), torch.is_grad_enabled()
    check_passes(passes, backbone.options.loop, backbone.fast_weight_layers)
    if not len(rows := rows[cache.counts[rows] > 0]):
        return report.nothing_slept()
    window = cache.window(rows)
    done = _repeat_passes(backbone, window, passes, tol, max_passes)
    # In training nothing is measured: reading a norm would make every step wait for the device.
    change = {} if learns else report.relative_by_layer(cache, done.after, done.changes, "cache")
    freed = cache.cross_boundary(window, done.after)
    record = report.report_of(window, done, change, freed, began)
    if not learns:
        cache.reports.append(record)
    return record


def _repeat_passes(
    backbone: Backbone, window: Window, passes: Passes, tol: float, max_passes: int
) -> Outcome:
    (_, end), blocks = backbone.options.loop, len(backbone.blocks)
    writer, learns = writer_of(backbone, window), torch.is_grad_enabled()
    N, auto = (max_passes, True) if passes == "auto" else (passes, False)
    depths, active = torch.ones_like(window.lengths), window.lengths > 0
    changes: list[report.Change] = []
    if N == 1 or writer is None:
        why = "only one pass" if N == 1 else "no layer leaves anything behind"
        return Outcome({}, depths, changes, f"eager: {why}")
    through = N if backbone.truncation.passes is None else backbone.truncation.passes
    carry = after_pass_one(backbone, window, watch=auto, cut=learns and through < N)
    measure = bool(carry.S) and (auto or not learns)
    with execution.start(backbone, carry) as run:
        for j in range(2, N + 1):
            # A pass known to be the last one leaves out what only a further one would read.
            last = writer if j == N and writer < end and not auto else None
            looped = backbone.options.looped_blocks(j, blocks)
            with torch.set_grad_enabled(learns and j > N - through):
                run(looped_pass, looped=looped, last=last, measure=measure)
            depths = depths + active
            if measure:
                changes.append((tuple(carry.S), run.read("change")))
            if auto:
                active = active & (report.relative_by_row(changes[-1][1]) >= tol)
                if not bool(active.any()):
                    break
                run.write("active", active.to(window.hidden.device))
        if writer >= end:
            run(coda, last=writer)
        after = after_passes(run.read("S"), run.read("left"))
    return Outcome(after, depths, changes, run.path)


def looped_pass(
    backbone: Backbone, carry: Carry, *, looped: range, last: int | None, measure: bool
) -> Carry:
    """`h, S <- LoopedBlocks(h, S)`, the blocks `looped`, up to the layer `last` if it is given."""
    # Keys and tails are short-term, and this pass's own.
    states = carry.start
    if backbone.options.carry != "hidden_states":
        states = states | {i: states.get(i, LayerState())._replace(S=S) for i, S in carry.S.items()}
    h, after = backbone.run_blocks(looped, carry.entering, states, carry.context, last_writer=last)
    new = {"h": carry.h if h is None else h, "S": {i: after[i].S for i in carry.S}}
    if backbone.options.is_sliding:
        new["left"] = carry.left | {i: state._replace(S=None) for i, state in after.items()}
    done = carry.update(**new)
    return done._replace(change=report.change_of(carry.S, done.S)) if measure else done


def coda(backbone: Backbone, carry: Carry, *, last: int) -> Carry:
    """`S <- Coda(h, S)` from the window's start; of the block `last` only what it writes.

    On pass 1 the coda had to run to predict, but read hidden states that the sleep has since
    refined: what it wrote then is undone by starting where the window did.
    """
    blocks = range(backbone.options.loop[1], last + 1)
    _, after = backbone.run_blocks(blocks, carry.h, carry.start, carry.context, last_writer=last)
    if not backbone.options.is_sliding:
        after = {i: LayerState(state.S) for i, state in after.items() if state.S is not None}
    return carry._replace(left=carry.left | after)
