"""The map of depth: trained small, its verdicts against numbers by hand."""

from __future__ import annotations

import pytest

from hybrid_sleep.eval import results as files
from hybrid_sleep.eval.measure.depth import TaskRecord
from hybrid_sleep.eval.render import depth_map as render
from hybrid_sleep.eval.studies import depth_map
from hybrid_sleep.eval.studies.depth_map import Cell, DepthMap
from hybrid_sleep.eval.tasks.accuracy import Accuracy
from hybrid_sleep.eval.trials import Call, Trial

CONFIG = """
model: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
        linear_num_key_heads: 2, linear_num_value_heads: 2, linear_key_head_dim: 8,
        linear_value_head_dim: 8}
task: {name: rule110, params: {width: 4, states: 2, steps: [0, 1]}}
sleep_passes: 2
train: {steps: 3, batch_size: 8, device: cpu, threads: 1, schedule: constant}
output_dir: {out}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("{out}", str(tmp_path / "models")))
    return path


@pytest.mark.slow
def test_a_map_trains_every_cell_at_its_compute(tmp_path, config):
    out = tmp_path / "results"
    call = Call(config=config, overrides=["train.steps=6"], seeds=[5], count=30, out=out)
    result = depth_map.run(call, "task.params.steps=[0,2]", depths=[1, 3], compute=[1, 2])
    assert len(result.rows) == len(result.cells) == 8
    for row in result.rows:
        cell = result.cells[row.variant]
        wanted = cell.compute * result.flops
        step = row.cost["training_flops"] / row.steps
        assert abs(row.cost["training_flops"] - wanted) <= step / 2
        assert list(row.accuracy) == row.depths == [cell.depth]
        assert str(row.config["task"]["params"]["steps"]) == cell.value
    text = files.save(result, out)[1].read_text()
    assert "| 0 | 0.250 | 1x |" in text
    assert files.render(out / "results.json")


def test_a_map_of_one_model(tmp_path, config):
    call = Call(config=config, seeds=[0], count=8, out=tmp_path / "results")
    result = depth_map.run(call, "task.params.steps=[1]", depths=[2], compute=[1])
    ((seed, trial),) = result.at("1", 1.0)[2].items()
    assert (seed, trial.depths, trial.steps) == (0, [2], 3)
    assert result.flops == trial.cost["training_flops"]
    assert result.complete and "| 1 | " in files.save(result, call.out)[1].read_text()


def result_of(**shares):
    """A map of one value and compute: shares of the seeds 0, 1... by depth, `n1=[...]`."""
    rows, cells = [], {}
    for name, seeds in shares.items():
        depth = int(name.removeprefix("n"))
        cells[name] = Cell(value="4", depth=depth, compute=1.0)
        for seed, share in enumerate(seeds):
            accuracy = Accuracy(exact=share, per_question=share, per_label=share, seconds=1.0,
                                passes=depth)  # fmt: skip
            rows.append(
                Trial(variant=name, seed=seed, depths=[depth], examples=10, config={},
                      first_weights=None, steps=3, seconds=1.0, accuracy={depth: accuracy})
            )  # fmt: skip
    task = TaskRecord(name="rule110", params={"width": 4, "steps": 4}, difficulty="steps",
                      floor={4: 0.5}, majority={}, chance=0.5)  # fmt: skip
    return DepthMap(
        config="run.yaml", overrides=[], examples=10, seeds=[0, 1], clock="processor", rows=rows,
        task=task, key="task.params.steps", values=["4"], floors={"4": 0.5},
        depths=sorted(cell.depth for cell in cells.values()), compute=[1.0], flops=1.0, cells=cells,
        provenance={},
    )  # fmt: skip


def test_the_map_says_who_wins_and_whether_the_seeds_agree():
    (line,) = render.verdicts(result_of(n1=[0.4, 0.6], n2=[0.7, 0.7]))
    assert line == (
        "steps = 4, 1x compute: N = 2 is best (0.700), +0.200 over N = 1 (+0.100 to +0.300), with "
        "every seed."
    )
    (line,) = render.verdicts(result_of(n1=[0.2, 0.8], n2=[0.7, 0.7]))
    assert line.endswith("+0.200 over N = 1 (-0.100 to +0.500), but the seeds do not agree.")
    (line,) = render.verdicts(result_of(n1=[0.68, 0.7], n2=[0.7, 0.7]))
    assert line == "steps = 4, 1x compute: N = 1 and N = 2 are within 0.02 (0.700)."
    (line,) = render.verdicts(result_of(n1=[0.6, 1.0], n2=[0.7, 0.7]))
    assert line.endswith("N = 1 is best (0.800), but not with every seed.")
    (line,) = render.verdicts(result_of(n1=[0.8, 0.9], n2=[0.7, 0.7]))
    assert line.endswith("N = 1 is best (0.850), with every seed.")
    # Depth 1 has no seed yet, so that there is nothing to compare with.
    (line,) = render.verdicts(result_of(n1=[], n2=[0.7], n4=[0.9]))
    assert line == "steps = 4, 1x compute: N = 4 is best (0.900)."


def test_a_map_comes_back_from_its_file():
    result = result_of(n1=[0.4, 0.6], n2=[0.7, 0.7])
    assert DepthMap.from_content(result.content()) == result


@pytest.mark.parametrize(
    ("vary", "given", "message"),
    [
        ("task.params.steps=4", {}, "vary must be such as .*, got 'task.params.steps=4'"),
        ("task.params.steps=[]", {}, "vary must be such as"),
        ("task.params.steps=[-1]", {}, "steps must be .* at least 0 .*, got -1"),
        ("task.params.steps=[1]", {"depths": [0]}, "depths must be .* of at least 1, got 0"),
    ],
)
def test_an_impossible_map_is_refused(config, vary, given, message):
    with pytest.raises(ValueError, match=message):
        depth_map.run(Call(config=config), vary, **given)
