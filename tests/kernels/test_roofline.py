"""What the kernel benchmark divides by: the least an op moves and multiplies, and its clock."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hybrid_sleep.kernels.benchmarks import cases, ops, roofline, timing
from hybrid_sleep.kernels.benchmarks.cases import BOTH, FORWARD, STATE, Shape

COUNTED = {"q", "k", "v", "g", "beta", "initial_state", "x", "kv", "a", "b"}


class TestTiming:
    def test_all_are_called_once_a_round_and_each_is_first_in_some_round(self):
        order = []
        seconds = timing.interleaved(
            {name: partial(order.append, name) for name in "abc"}, 4, 0, lambda work: work() or 1.0
        )
        assert "".join(order) == "abcbcacababc"
        assert seconds == {name: [1.0] * 4 for name in "abc"}

    def test_the_median_and_the_quartiles(self):
        assert timing.median_and_quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, [2.0, 4.0])
        assert timing.median_and_quartiles([7.0]) == (7.0, [7.0, 7.0])


class TestRoofline:
    @pytest.mark.parametrize("direction", [FORWARD, STATE, BOTH])
    @pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
    def test_bytes_are_those_of_the_tensors(self, op, direction):
        """Counted on a call: inputs in, results out; then both kinds of gradients."""
        if direction not in op.directions:
            pytest.skip("not a direction of this op")
        shape, dtype = Shape(T=6, B=2, H=4, d=8), torch.bfloat16
        given = cases.inputs(op.inputs, shape, dtype, "cpu")
        results = cases.job(cases.ours(op.op, "chunked"), given, direction)()
        count = 1 if direction == STATE else 2
        # What is read once for all tokens, and tails of three tokens, are not counted.
        read = {n: x for n, x in given.items() if n in COUNTED}
        if direction == STATE:
            del read["q"]
        moved = [*read.values(), *results[:count]]
        if direction == BOTH:
            # The state before is needed by neither half of the derivative of the other inputs.
            again = [x for n, x in read.items() if n != "initial_state"]
            moved += [*again, *results[:2], *read.values()]
        expected = sum(x.numel() * x.element_size() for x in moved)
        found = op.cost(shape, direction, dtype.itemsize).bytes
        if op.name == "short_conv" and direction == BOTH:
            # The gradients of its tail, three of T + 3 rows, are left out as well.
            expected -= 2 * given["initial_state"].numel() * 2
        assert found == expected

    def test_flops_are_the_published_ones(self):
        long = Shape(T=10**6, B=1, H=1, d=128)
        per_token = {
            direction: ops.OPS[0].cost(long, direction, 2) for direction in (FORWARD, STATE)
        }
        assert per_token[FORWARD].flops / long.T == pytest.approx(166.6e3, rel=1e-3)
        assert per_token[STATE].flops / long.T == pytest.approx(101.0e3, rel=1e-3)
        assert per_token[FORWARD].bytes / long.T == pytest.approx(1032, abs=0.2)
        assert per_token[STATE].bytes / long.T == pytest.approx(520, abs=0.2)

    def test_the_floor_is_the_tighter_of_two_measured_limits(self):
        limits = roofline.measure("cpu", copied=2**12, side=16, repeats=3)
        assert limits.bandwidth > 0 and limits.rate > 0
        limits = roofline.Limits(bandwidth=10.0, rate=100.0)
        assert roofline.floor_seconds(roofline.Cost(50.0, 100.0), limits) == 5.0
        assert roofline.floor_seconds(roofline.Cost(50.0, 900.0), limits) == 9.0
