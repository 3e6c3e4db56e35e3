"""The Fisher information against closed forms, full enumeration, and gradients taken by hand."""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import scipy.stats
import torch
from continual import Recurrent, Softmax, randn
from editable import tiny_gpt2, tiny_hybrid, tiny_llama
from torch import nn

from hybrid_sleep.parametric import fisher as module
from hybrid_sleep.parametric.fisher import Fisher, estimate_fisher, left_out, sample
from hybrid_sleep.sleep.weights import weights_digest
from hybrid_sleep.training.data import derive_seed

ROWS = [[1, 2, 3, 4, 5, 6, 7], [3, 4, 5], [1], [5, 6, 7, 8, 9, 1, 2, 3, 4]]


def nothing(model):
    return {}


def labelled(monkeypatch, labels):
    """From here on the labels that a model samples are `labels`, in the order of the rows."""
    left = [torch.tensor(row) for row in labels]
    monkeypatch.setattr(module, "sample", lambda logits, uniform: left.pop(0))


def score(model, row, labels):
    """Gradient of the log-likelihood of `labels` behind the tokens of `row`, by name."""
    logits = model(input_ids=torch.tensor([row])).logits[0]
    total = sum(logits[t].log_softmax(-1)[y] for t, y in enumerate(labels) if y >= 0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g
            for n, p, g in zip(names, parameters, found, strict=True)}  # fmt: skip


@pytest.fixture
def regression():
    """Five tokens with three features each, three classes, a row a token."""
    model = Softmax(randn(5, 3, seed=1), 3)
    return model, [[i, 0] for i in range(5)]


def closed_form(model, rows):
    """`F[c, k] = mean_n x[n, k]^2 p_c (1 - p_c)`."""
    x = model.x[[row[0] for row in rows]]
    p = (x @ model.weight.detach().T).softmax(-1)
    return torch.einsum("nk,nc->ck", x.square(), p * (1 - p)) / len(rows)


def expected(monkeypatch, model, rows, classes, **options):
    """What `estimate_fisher` gives on average over all labels, each with its probability."""
    probabilities = [
        model(input_ids=torch.tensor([row])).logits[0, :-1].softmax(-1).detach() for row in rows
    ]
    sites = [(i, t) for i, row in enumerate(rows) for t in range(len(row) - 1)]
    total = {}
    for labels in itertools.product(range(classes), repeat=len(sites)):
        weight = 1.0
        given = [[] for _ in rows]
        for (i, t), label in zip(sites, labels, strict=True):
            weight = weight * probabilities[i][t, label].double()
            given[i].append(label)
        with monkeypatch.context() as patch:
            labelled(patch, given)
            found = estimate_fisher(model, rows, left_out=nothing, **options)
        for name, value in found.values.items():
            total[name] = total.get(name, 0.0) + weight * value.double()
    return total


def test_o1_softmax_regression_has_its_closed_form(regression, monkeypatch):
    model, rows = regression
    each = [expected(monkeypatch, model, [row], 3)["weight"] for row in rows]
    torch.testing.assert_close(torch.stack(each).mean(0), closed_form(model, rows),
                               rtol=1e-5, atol=1e-7)  # fmt: skip


def test_o1_the_closed_form_is_the_diagonal_of_the_hessian_for_any_labels(regression):
    model, rows = regression
    for labels in ([0, 1, 2, 0, 1], [2, 2, 2, 2, 2]):

        def loss(weight, labels=labels):
            return nn.functional.cross_entropy(model.x @ weight.T, torch.tensor(labels))

        hessian = torch.autograd.functional.hessian(loss, model.weight.detach())
        diagonal = hessian.reshape(9, 9).diagonal().reshape(3, 3)
        torch.testing.assert_close(diagonal, closed_form(model, rows), rtol=1e-12, atol=1e-14)


def test_o2_a_language_model_enumerated_over_all_labels(monkeypatch):
    """All 3^3 labels behind a row, against the sum over positions of `E[g_t^2]`."""
    model, row = Recurrent(), [0, 2, 1, 0]
    wanted = {}
    probabilities = model(input_ids=torch.tensor([row])).logits[0].softmax(-1).detach()
    for t, y in itertools.product(range(3), range(3)):
        labels = [-1] * 3
        labels[t] = y
        for name, g in score(model, row, labels).items():
            wanted[name] = wanted.get(name, 0.0) + probabilities[t, y] * g.square()
    found = expected(monkeypatch, model, [row], 3)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8)


def test_o2_samples_converge_to_it_and_true_labels_do_not(monkeypatch):
    model, row = Recurrent(), [0, 2, 1, 0]
    exact = sum(float(x.sum()) for x in expected(monkeypatch, model, [row], 3).values())
    many = estimate_fisher(model, [row] * 300, batch=2, left_out=nothing)
    sampled = sum(float(x.sum()) for x in many.values.values())
    assert sampled == pytest.approx(exact, rel=0.2)
    labelled(monkeypatch, [row[1:]])
    true = estimate_fisher(model, [row], left_out=nothing)
    empirical = sum(float(x.sum()) for x in true.values.values())
    assert abs(empirical / exact - 1) > 0.5


def test_o3_the_size_of_a_batch_does_not_bias_it(regression, monkeypatch):
    model, rows = regression
    one, all_at_once = (
        expected(monkeypatch, model, rows[:3], 3, batch=batch)["weight"] for batch in (1, 3)
    )
    torch.testing.assert_close(all_at_once, one, rtol=1e-5, atol=1e-7)


def test_o3_with_true_labels_it_would(regression, monkeypatch):
    """A model that misfits: all rows push the same way, so batches square their sum."""
    model, rows = regression
    ratios = []
    for batch in (1, 4, 20):
        with monkeypatch.context() as patch:
            labelled(patch, [[0]] * 20)
            found = estimate_fisher(model, rows[:1] * 20, batch=batch)
        ratios.append(float(found.values["weight"].sum()))
    assert ratios[1] == pytest.approx(4 * ratios[0]) and ratios[2] == pytest.approx(20 * ratios[0])


def test_labels_are_drawn_from_the_prediction_itself():
    """Chi-square over 20000 draws; no label of probability 0, nor any filter."""
    p = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.15, 0.04, 0.01])
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = sample(p.log().expand(20000, -1), u)
    counts = labels.bincount(minlength=7)
    assert counts[[0, 3]].tolist() == [0, 0]
    kept = p > 0
    assert scipy.stats.chisquare(counts[kept], 20000 * p[kept] / p[kept].sum()).pvalue > 0.01
    assert sample(p.log()[None], torch.zeros(1, dtype=torch.float64)).tolist() == [1]
    assert sample(p.log()[None], torch.full((1,), 1 - 1e-16).double()).tolist() == [6]


MODELS = {
    "hybrid that sleeps": lambda: tiny_hybrid(window=4),
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_is_the_square_of_the_sum_of_what_its_rows_give_alone(kind, monkeypatch):
    """Rows of several lengths, padded; the third has nothing to predict and does not count."""
    model, drawn = MODELS[kind](), []

    def recorded(logits, uniform):
        drawn.append(sample(logits, uniform))
        return drawn[-1]

    monkeypatch.setattr(module, "sample", recorded)
    estimate_fisher(model, ROWS, batch=1, seed=3, left_out=nothing)
    alone, drawn = drawn, []
    found = estimate_fisher(model, ROWS, batch=3, seed=3, left_out=nothing)
    assert [x.tolist() for x in drawn] == [x.tolist() for x in alone]
    assert [len(x) for x in drawn] == [8, 6, 2]
    order = (3, 0, 1)
    scores = [score(model, ROWS[i], y.tolist()) for i, y in zip(order, drawn, strict=True)]
    assert (found.sequences, found.tokens) == (3, 16)
    for name, value in found.values.items():
        wanted = sum(one[name] for one in scores).square() / 3
        assert value.dtype == torch.float32 and value.shape == wanted.shape
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-9)


def test_labels_of_a_row_come_from_the_seed_and_its_index():
    model = tiny_llama()
    alone = estimate_fisher(model, ROWS, batch=1)
    again = estimate_fisher(model, ROWS, batch=1)
    other = estimate_fisher(model, ROWS, batch=1, seed=1)
    assert all(torch.equal(alone.values[n], again.values[n]) for n in alone.values)
    assert not all(torch.equal(alone.values[n], other.values[n]) for n in alone.values)
    u = torch.rand(2, generator=torch.Generator().manual_seed(derive_seed("labels", 0, 1)),
                   dtype=torch.float64)  # fmt: skip
    logits = model(input_ids=torch.tensor([ROWS[1]])).logits[0, :2]
    by_hand = score(model, ROWS[1], sample(logits, u).tolist())
    (found,) = [estimate_fisher(model, [[1], ROWS[1]])]
    name = "lm_head.weight"
    torch.testing.assert_close(found.values[name].double(), by_hand[name].square(),
                               rtol=1e-5, atol=1e-9)  # fmt: skip


def test_only_targets_count(monkeypatch):
    model = tiny_llama()
    targets = [[False] * 5 + [True] * 2, [True, False, False], [True], [False, True, *[False] * 7]]
    labelled(monkeypatch, [[7], [1, 4]])
    found = estimate_fisher(model, ROWS, targets=targets, batch=1)
    assert (found.sequences, found.tokens) == (2, 3)
    one = score(model, ROWS[0], [-1] * 4 + [1, 4])["lm_head.weight"]
    other = score(model, ROWS[3], [7])["lm_head.weight"]
    wanted = (one.square() + other.square()) / 2
    torch.testing.assert_close(found.values["lm_head.weight"].double(), wanted,
                               rtol=1e-5, atol=1e-9)  # fmt: skip


def test_o7_two_ranks_have_the_sums_of_one(monkeypatch):
    """Two threads that meet at every reduction, with half of the rows of a batch each."""
    rows = [*ROWS, [2, 1], [9, 8, 7, 6, 5]]
    wanted = estimate_fisher(tiny_llama(), rows, batch=3)
    models, found, held = [tiny_llama(), tiny_llama()], {}, {}
    meeting, own = threading.Barrier(2), threading.local()

    def add(values):
        held[own.rank] = values.clone()
        meeting.wait(30)
        total = held[0] + held[1]
        meeting.wait(30)
        return total

    monkeypatch.setattr(module, "add_over_ranks", add)
    monkeypatch.setattr(module, "ranks", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: own.rank)

    def run(rank):
        own.rank = rank
        found[rank] = estimate_fisher(models[rank], rows, batch=3)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in (0, 1):
        assert (found[rank].sequences, found[rank].tokens) == (wanted.sequences, wanted.tokens)
        for name, value in wanted.values.items():
            torch.testing.assert_close(found[rank].values[name], value, rtol=1e-5, atol=1e-8)


def test_the_model_and_the_world_stay_as_they_were():
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.grad = torch.ones_like(
        model.model.layers[0].mlp.up_proj.weight
    )
    before = copy.deepcopy({n: (p.requires_grad, p.grad) for n, p in model.named_parameters()})
    modes = {name: m.training for name, m in model.named_modules()}
    state, weights = torch.get_rng_state(), weights_digest(model)
    with torch.no_grad():
        found = estimate_fisher(model, ROWS)
    assert torch.equal(torch.get_rng_state(), state) and weights_digest(model) == weights
    assert {name: m.training for name, m in model.named_modules()} == modes
    for name, p in model.named_parameters():
        flag, grad = before[name]
        assert p.requires_grad == flag and (p.grad is None) == (grad is None), name
        assert grad is None or torch.equal(p.grad, grad)
    assert found.left_out["lm_head.weight"] == "frozen"
    quiet = estimate_fisher(model.eval(), ROWS)
    assert all(torch.equal(quiet.values[n], x) for n, x in found.values.items())


def test_what_is_left_out_is_said_by_name():
    hybrid = tiny_hybrid(tie_word_embeddings=True)
    found = estimate_fisher(hybrid, ROWS)
    every = {name for name, _ in hybrid.named_parameters(remove_duplicate=False)}
    assert found.values.keys() | found.left_out.keys() == every
    assert not found.values.keys() & found.left_out.keys()
    mixer = "model.layers.1.mixer"
    assert found.left_out[f"{mixer}.A_log"] == found.left_out[f"{mixer}.dt_bias"] == "gate"
    assert found.left_out[f"{mixer}.q_conv"] == "convolution"
    assert found.left_out[f"{mixer}.o_norm.weight"] == "norm"
    assert found.left_out["model.embed_tokens.weight"] == "embedding"
    assert found.left_out["lm_head.weight"] == "tied to model.embed_tokens.weight"
    assert all(found.values[n].ndim == 2 for n in found.values)
    # Tied weights count once, with the gradients of both uses.
    whole = estimate_fisher(hybrid, ROWS, left_out=nothing)
    assert "lm_head.weight" not in whole.values and "model.embed_tokens.weight" in whole.values
    either = estimate_fisher(hybrid, ROWS, left_out=lambda m: {"lm_head.weight": "head"})
    assert either.left_out["model.embed_tokens.weight"] == "head"
    assert left_out(tiny_gpt2())["transformer.h.0.ln_1.bias"] == "norm"


def test_half_precision_does_not_overflow_when_squared():
    model = Softmax(torch.full((2, 3), 1000.0), 3).half()
    model.weight.data.zero_()
    found = estimate_fisher(model, [[0, 1], [1, 0]])
    assert found.values["weight"].dtype == torch.float32
    assert 65504 < float(found.values["weight"].max()) < torch.inf
    model.x[:] = 60000.0
    with pytest.raises(ValueError, match="must have finite gradients, got others for 'weight'"):
        estimate_fisher(model, [[0, 1]] * 4)


def test_normalised_values_have_mean_1_whatever_the_scale(regression):
    model, rows = regression
    found = estimate_fisher(model, rows)
    scaled = found.normalised()
    assert scaled.mean == pytest.approx(1, rel=1e-6) and found.mean != pytest.approx(1)
    times = Fisher({"weight": found.values["weight"] * 1e6}, 5, 5, {}, found.model)
    torch.testing.assert_close(times.normalised().values["weight"], scaled.values["weight"])
    # Over all entries, not tensor by tensor.
    two = Fisher({"a": torch.ones(3), "b": torch.full((1,), 5.0)}, 1, 1, {}, "")
    assert two.normalised().values["b"].tolist() == [2.5] and two.mean == 2.0
    with pytest.raises(ValueError, match="must not all be 0"):
        Fisher({"a": torch.zeros(3)}, 1, 1, {}, "").normalised()


def test_o7_it_is_saved_and_loaded_and_refused_for_other_weights(tmp_path):
    model = tiny_gpt2()
    found = estimate_fisher(model, ROWS)
    found.save(tmp_path / "fisher.safetensors")
    loaded = Fisher.load(tmp_path / "fisher.safetensors")
    assert (loaded.sequences, loaded.tokens, loaded.model) == (3, 16, weights_digest(model))
    assert loaded.left_out == found.left_out and loaded.values.keys() == found.values.keys()
    assert all(torch.equal(loaded.values[n], x) for n, x in found.values.items())
    loaded.check(model)
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] += 1
    with pytest.raises(ValueError, match="must have the weights that the Fisher information is of"):
        loaded.check(model)
    data = bytearray((tmp_path / "fisher.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="bad.safetensors is damaged"):
        Fisher.load(tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError, match="none.safetensors is missing"):
        Fisher.load(tmp_path / "none.safetensors")


def test_arguments_that_do_not_fit_are_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match="batch must be an integer of at least 1, got 0"):
        estimate_fisher(model, ROWS, batch=0)
    with pytest.raises(ValueError, match="must hold a predicted token behind another, got none"):
        estimate_fisher(model, [[1], []])
    with pytest.raises(ValueError, match=r"targets\[1\] must say it of all 3 tokens"):
        estimate_fisher(model, ROWS, targets=[[True] * 7, [True], [True], [True] * 9])
    with pytest.raises(ValueError, match="targets must be of all 4 rows, got 1"):
        estimate_fisher(model, ROWS, targets=[[True] * 7])
    with pytest.raises(ValueError, match="left_out must give names of parameters, got 'x'"):
        estimate_fisher(model, ROWS, left_out=lambda m: {"x": "gate"})
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 has partitioned 'lm_head.weight'"):
        estimate_fisher(model, ROWS)
    frozen = tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="must have a trainable parameter that is not left out"):
        estimate_fisher(frozen, ROWS)
