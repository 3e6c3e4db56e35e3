"""Circuits: values by hand and by another evaluation, floors by enumeration, splits apart."""

from __future__ import annotations

import itertools
import operator
from fractions import Fraction

import numpy as np
import pytest
import torch

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks.repeated import Repeated

OPERATORS = {
    "xor": operator.xor,
    "xnor": lambda a, b: 1 - (a ^ b),
    "and": operator.and_,
    "or": operator.or_,
}
VARIANTS = [
    {},
    {"wires": 3, "levels": 5, "order": "reverse"},
    {"wires": 2, "levels": 1},
    {"wires": 4, "levels": 7, "order": "random", "windows": 2, "asked": [3, 7]},
    {"wires": 5, "levels": 3, "windows": 2, "asked": 2},
    {"wires": 2, "levels": 4, "order": "reverse", "asked": [1, 4]},
    {"wires": 3, "levels": 4, "asked": [1, 2, 4], "queries": 2, "windows": 3},
]


def by_params(params):
    return ",".join(f"{key}={value}" for key, value in params.items()) or "default"


def values_of(inputs, gates):
    """Value by (level, wire), each worked out from the definition, by recursion."""

    def value(level, wire):
        if level == 0:
            return inputs[wire]
        kind, a, b = gates[level - 1][wire]
        return OPERATORS[kind](value(level - 1, a), value(level - 1, b))

    return {
        (level, wire): value(level, wire)
        for level in range(1, len(gates) + 1)
        for wire in range(len(inputs))
    }


def test_a_circuit_worked_out_by_hand():
    """Two wires, two levels: inputs 1 and 0; xor 1, and 0; then xnor 0, or 1.

    Six nodes, one pair of wires: a token is six times what it is (0, 1, xor, xnor, and, or, a
    question, the stop), plus the node: inputs 0, 1; level 1: 2, 3; level 2: 4, 5.
    """
    task = tasks.load("circuit", wires=2, levels=2)
    assert (task.vocab_size, task.window, task.length) == (48, 6, 11)
    assert task.token_fields == [8, 6, 1]
    circuit = [6 + 0, 0 + 1, 12 + 2, 24 + 3, 18 + 4, 30 + 5]
    tokens = [*circuit, 36 + 4, 36 + 2, 36 + 5, 36 + 3, 42]
    assert task.parse(tokens) == {
        "inputs": [1, 0],
        "gates": [[("xor", 0, 1), ("and", 0, 1)], [("xnor", 0, 1), ("or", 0, 1)]],
        "queries": [(2, 0, 0), (1, 0, 1), (2, 1, 1), (1, 1, 0)],
    }
    assert task.describe({"input_ids": tokens}) == (
        "level 0: 0 = 1, 1 = 0\n"
        "level 1: 0 = 0 xor 1, 1 = 0 and 1\n"
        "level 2: 0 = 0 xnor 1, 1 = 0 or 1\n"
        "wire 0 of level 2: 0\nwire 0 of level 1: 1\nwire 1 of level 2: 1\nwire 1 of level 1: 0"
    )
    backwards = tasks.load("circuit", wires=2, levels=2, order="reverse")
    assert backwards.parse([*circuit[::-1], *tokens[6:]]) == task.parse(tokens)
    mixed = tasks.load("circuit", wires=2, levels=2, order="random")
    for order in itertools.permutations(circuit[2:]):
        assert mixed.parse([*circuit[:2], *order, *tokens[6:]]) == task.parse(tokens)
    one, two, *gates = circuit
    for wrong in ([two, one, *gates], [one, gates[0], two, *gates[1:]]):
        with pytest.raises(ValueError, match="input_ids must be 2 inputs and 4 gates"):
            mixed.parse([*wrong, *tokens[6:]])


def test_linear_gates_are_counted_apart_from_the_others():
    """The circuit above: xnor, xor, or and and are asked for; the second and third are missed."""
    task = tasks.load("circuit", wires=2, levels=2)
    tokens = [6, 1, 14, 27, 22, 35, 40, 38, 41, 39, 42]
    labels = [-100] * 7 + [0, 6, 6, 0]
    example = {"input_ids": tokens, "labels": labels, "meta": {"difficulty": [2, 1, 2, 1]}}
    predicted = [labels[:7] + [0, 0, 0, 0]]
    expected = {"XOR and XNOR": {1: 0.0, 2: 1.0}, "AND and OR": {1: 1.0, 2: 0.0}}
    assert task.score(predicted, [example])["by_kind"] == expected
    repeated = Repeated(task, 2)
    twice = {**example, "input_ids": tokens[:6] + tokens, "labels": [-100] * 6 + labels}
    assert repeated.score([[-100] * 6 + predicted[0]], [twice])["by_kind"] == expected
    # Rule 110 tells no kinds apart.
    other = tasks.load("rule110", width=4, states=2, steps=[0, 1])
    examples = list(other.examples("test", 0, 3))
    assert "by_kind" not in other.score([e["labels"] for e in examples], examples)


def test_the_pair_that_a_gate_reads_is_a_digit():
    """Three wires, one level: 1, 1, 0; gates 0 and 2, 1 xor 2, 0 xnor 1."""
    task = tasks.load("circuit", wires=3, levels=1)
    assert task.token_fields == [8, 6, 3]  # pairs: 0 and 1, 0 and 2, 1 and 2
    inputs = [18 * 1 + 3 * 0, 18 * 1 + 3 * 1, 18 * 0 + 3 * 2]
    gates = [18 * 4 + 3 * 3 + 1, 18 * 2 + 3 * 4 + 2, 18 * 3 + 3 * 5 + 0]
    read = task.parse([*inputs, *gates, 18 * 6 + 3 * 5, 18 * 6 + 3 * 3, 18 * 6 + 3 * 4, 18 * 7])
    assert read["inputs"] == [1, 1, 0]
    assert read["gates"] == [[("and", 0, 2), ("xor", 1, 2), ("xnor", 0, 1)]]
    assert read["queries"] == [(1, 2, 1), (1, 0, 0), (1, 1, 1)]


def test_the_stream_never_changes():
    """A seed in an old result must mean the same examples for ever."""
    task = tasks.load("circuit", wires=2, levels=2, order="random")
    (example,) = task.examples("test", 3, 1)
    # Inputs 0 and 0; then gates 3, an AND: 0; 5, an XOR: 1; 4, an XNOR: 0; 2, an XNOR: 1.
    assert example["input_ids"] == [0, 1, 27, 17, 22, 20, 38, 41, 39, 40, 42]
    assert example["labels"] == [-100] * 7 + [6, 6, 0, 0]
    assert example["meta"] == {
        "task": "circuit", **task.params, "difficulty": [1, 2, 1, 2]
    }  # fmt: skip


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_every_label_is_the_value_of_the_gate_that_is_asked_for(params, split):
    task = tasks.load("circuit", **params)
    for example in task.examples(split, 3, 12):
        tokens, labels = example["input_ids"], example["labels"]
        assert len(tokens) == len(labels) == task.length and max(tokens) < task.vocab_size
        read = task.parse(tokens)
        values = values_of(read["inputs"], read["gates"])
        end = task.nodes
        assert labels[: end + 1] == [-100] * (end + 1)
        what, nodes, pairs = task.token_fields
        asked = [divmod(token, nodes * pairs) for token in tokens[end:-1]]
        assert {first for first, _ in asked} == {6} and tokens[-1] == 7 * nodes * pairs
        named = [divmod(rest // pairs, task.wires) for _, rest in asked]
        # The label of a question stands where the next one does.
        assert labels[end + 1 :] == [values[gate] * nodes * pairs for gate in named]
        assert read["queries"] == [(*gate, values[gate]) for gate in named]
        every = {gate for gate in values if gate[0] in task.asked}
        assert {*named} <= every
        assert len({*named}) == len(named) == (task.params["queries"] or len(every))
        assert example["meta"]["difficulty"] == [level for level, _ in named]


def test_orders_hold_the_same_circuits():
    """Nothing but the order of tokens differs, so that results of two orders can be compared."""
    made = {
        order: next(tasks.load("circuit", order=order).examples("train", 5, 1))["input_ids"]
        for order in ("topological", "reverse", "random")
    }
    nodes = 24
    forwards = made["topological"][:nodes]
    assert forwards == made["reverse"][:nodes][::-1]
    assert [token // 6 % nodes for token in forwards] == list(range(nodes))
    assert made["random"][:nodes] != forwards
    assert sorted(made["random"][:nodes]) == sorted(forwards)
    assert made["topological"][nodes:] == made["reverse"][nodes:]
    places = np.array(
        [e["input_ids"] for e in tasks.load("circuit", order="random").examples("train", 0, 4000)]
    )[:, :nodes]
    which = places // 6 % nodes
    assert (which[:, :4] == np.arange(4)).all()
    # A gate of level 1, of node 4 to 7, stands anywhere behind the inputs equally often: 4 of 20,
    # within 5 deviations.
    shares = (which[:, 4:] < 8).mean(axis=0)
    assert np.abs(shares - 4 / 20).max() < 5 * np.sqrt(4 / 20 * 16 / 20 / 4000)


def all_circuits(wires, levels):
    """Every circuit there is: inputs and gates."""
    pairs = list(itertools.combinations(range(wires), 2))
    kinds = list(itertools.product(OPERATORS, pairs))
    gates = [(kind, *pair) for kind, pair in kinds]
    for inputs in itertools.product((0, 1), repeat=wires):
        for drawn in itertools.product(gates, repeat=wires * levels):
            yield inputs, [drawn[i : i + wires] for i in range(0, wires * levels, wires)]


@pytest.mark.parametrize(("wires", "levels"), [(2, 2), (2, 3), (3, 1)])
def test_floors_by_enumeration(wires, levels):
    ones: dict[tuple[int, str], list[int]] = {}
    alike = total = 0
    for inputs, gates in all_circuits(wires, levels):
        values = values_of(inputs, gates)
        total += 1
        alike += not any(values.values())
        for (level, wire), value in values.items():
            ones.setdefault((level, gates[level - 1][wire][0]), []).append(value)
    task = tasks.load("circuit", wires=wires, levels=levels)
    assert task.floor() == {level: 0.5 for level in range(1, levels + 1)}
    for level in range(1, levels + 1):
        of_kind = {kind: ones[level, kind] for kind in OPERATORS}
        count = sum(map(len, of_kind.values()))
        assert sum(map(sum, of_kind.values())) * 2 == count
        best = Fraction(sum(max(sum(v), len(v) - sum(v)) for v in of_kind.values()), count)
        assert task.gate_alone()[level] == pytest.approx(float(best), abs=1e-12)
    found = task.majority()
    assert found.exact == pytest.approx(alike / total, abs=1e-12)
    assert (found.per_label, found.guess, task.chance()) == (0.5, (0,), 0.5)


@pytest.mark.parametrize("queries", [None, 2])
def test_the_majority_of_some_levels_by_drawing(queries):
    task = tasks.load("circuit", wires=3, levels=4, asked=[2, 4], queries=queries)
    labels = np.asarray(task.batch("train", 0, 20_000)["labels"])[:, task.nodes + 1 :]
    share = (labels == 0).all(axis=1).mean()
    want = task.majority().exact
    assert abs(share - want) < 5 * np.sqrt(want * (1 - want) / 20_000)


def test_splits_are_apart_and_drawn_the_same_however_sliced():
    task = tasks.load("circuit", wires=2, levels=2)
    circuits = {
        split: {tuple(e["input_ids"][: task.nodes]) for e in task.examples(split, seed, 8000)}
        for split, seed in (("train", 0), ("test", 1))
    }
    # 1,024 circuits in all: nearly every one was drawn.
    assert not circuits["train"] & circuits["test"]
    assert len(circuits["train"] | circuits["test"]) > 1000
    task = tasks.load("circuit", order="random")
    whole = task.batch("train", 7, 40)
    assert torch.equal(whole["input_ids"][:9], task.batch("train", 7, 9)["input_ids"])
    each = [e["labels"] for e in task.examples("train", 7, 40)]
    assert whole["labels"].tolist() == each
    assert not torch.equal(whole["input_ids"], task.batch("train", 8, 40)["input_ids"])


def test_some_of_the_gates_are_asked_for_equally_often():
    some, every = (tasks.load("circuit", wires=3, levels=2, queries=n) for n in (2, None))
    asked = []
    pairs = zip(*(task.examples("train", 0, 3000) for task in (some, every)), strict=True)
    for few, all_six in pairs:
        assert few["input_ids"][:-1] == all_six["input_ids"][: some.length - 1]
        assert few["meta"]["difficulty"] == all_six["meta"]["difficulty"][:2]
        asked += [(level, wire) for level, wire, _ in some.parse(few["input_ids"])["queries"]]
    shares = np.array([asked.count(gate) for gate in sorted({*asked})]) / 3000
    # Two of six, within 5 deviations.
    assert len(shares) == 6 and np.abs(shares - 1 / 3).max() < 5 * np.sqrt(2 / 9 / 3000)


def test_limited_to_a_level_circuits_stay_the_same():
    task = tasks.load("circuit", order="reverse")
    hard = task.only(4)
    assert hard.vocab_size == task.vocab_size and hard.window == task.window
    one, other = (next(t.examples("test", 2, 1)) for t in (task, hard))
    assert one["input_ids"][: task.nodes] == other["input_ids"][: task.nodes]
    assert other["meta"]["difficulty"] == [4] * 4
    assert list(task.only(1, 2).floor()) == [1, 2]
    with pytest.raises(ValueError, match=r"difficulty must be one or several of .*\[4\], got 3"):
        hard.only(3)


def test_a_model_sleeps_on_the_circuit_alone():
    task = tasks.load("circuit", wires=2, levels=3, windows=2, asked=3)
    config = HybridSleepConfig(
        vocab_size=task.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, linear_num_key_heads=1, linear_num_value_heads=1,
        linear_key_head_dim=8, linear_value_head_dim=8, window=task.window,
    )  # fmt: skip
    model = HybridSleepForCausalLM(config).eval()
    batch = task.batch("test", 0, 2)
    with torch.no_grad():
        cache = model(**batch, sleep_passes=3).cache
    assert cache.sleeps.tolist() == [2, 2] and [r.passes for r in cache.reports] == [3, 3]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"wires": 1}, "wires must be an integer of at least 2 and at most 64, got 1"),
        ({"levels": 0}, "levels must be an integer of at least 1 and at most 256, got 0"),
        ({"order": "sorted"}, "order must be one of 'topological', 'reverse', 'random'"),
        ({"asked": [6]}, r"asked must be levels of 1 to 5, got \[6\]"),
        ({"asked": []}, "asked must be an integer or a list of one or more"),
        ({"queries": 5}, "queries must be an integer of at least 1 and at most 4, got 5"),
        ({"windows": 5}, "windows must divide the 24 tokens of a circuit and leave at least 21"),
        ({"windows": 2}, "leave at least 21, those of the questions, to a window, got 2"),
    ],
)
def test_bad_parameters_are_named(params, said):
    with pytest.raises(ValueError, match=said):
        tasks.load("circuit", **params)


def test_what_is_no_circuit_is_refused():
    task = tasks.load("circuit", wires=2, levels=2)
    tokens = [6, 1, 14, 27, 22, 35, 40, 38, 41, 39, 42]
    assert task.parse(tokens)["inputs"] == [1, 0]
    for wrong in (
        tokens[:-1],
        [],
        [6, 6, *tokens[2:]],
        [1, 6, *tokens[2:]],
        [12, *tokens[1:]],
        [*tokens[:5], 5, *tokens[6:]],
        [*tokens[:6], 40, 40, *tokens[8:]],
        [*tokens[:6], 28, *tokens[7:]],
        [*tokens[:6], 36, *tokens[7:]],
        [*tokens[:-1], 41],
        [*tokens[:5], 53, *tokens[6:]],
        [*tokens[:5], -1, *tokens[6:]],
    ):
        with pytest.raises(ValueError, match="input_ids must be 2 inputs and 4 gates"):
            task.parse(wrong)
