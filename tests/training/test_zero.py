"""What a DeepSpeed JSON may say, and what is compiled when."""

import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from hybrid_sleep.training import zero
from hybrid_sleep.training.config import TrainConfig
from hybrid_sleep.training.optimizer import MuonAdamW, parameter_groups

SHIPPED = sorted((Path(__file__).parents[2] / "configs/deepspeed").glob("*.json"))


def settings(path, **more):
    given = {"steps": 1, "batch_size": 1, "lr_muon": None, **more}
    return TrainConfig(**given, deepspeed=str(path))


@pytest.fixture
def written(tmp_path):
    def write(content, **more):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return settings(path, **more)

    return write


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_what_their_name_says(path):
    config = zero.read_config(settings(path))
    stage, _, offload = path.stem.removeprefix("zero").partition("_")
    assert config["zero_optimization"]["stage"] == int(stage) == zero.stage(settings(path))
    assert zero.offloads_adam(config) == bool(offload)
    assert config["train_micro_batch_size_per_gpu"] == "auto"


ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("{", {}, "is damaged: no JSON"),
        ("[]", {}, "train.deepspeed must be a JSON object: .*holds a list"),
        (
            {"zero_optimization": {"stage": 4}},
            {},
            r"must have a zero_optimization.stage of 0 to 3, got 4",
        ),
        ({"optimizer": {}}, {}, "must leave 'optimizer' out, train.lr_muon"),
        ({"scheduler": {}}, {}, "must leave 'scheduler' out, train.schedule"),
        ({"activation_checkpointing": {}}, {}, "would drop fast weights"),
        ({"gradient_clipping": 1.0}, {}, "'auto', train.grad_clip decides"),
        ({"train_batch_size": 8}, {}, "'auto', train.batch_size decides"),
        ({"bf16": {"enabled": True}}, {}, "must not enable 'bf16', .* train.dtype: bfloat16"),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}},
            {},
            "on_model_save=True to save a model, got False",
        ),
        (
            ZERO2,
            {"lr_muon": 0.02},
            r"train.grad_clip must be null for Muon under ZeRO stage 2, .*, got 1.0",
        ),
        (
            {"zero_optimization": {"stage": 1, "reduce_scatter": True}},
            {"lr_muon": 0.02, "grad_clip": None},
            "reduce_scatter=False for Muon under ZeRO stage 1, got True",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            {"lr_muon": 0.02, "grad_clip": None},
            "must have no offload_optimizer with train.lr_muon=0.02; lr_muon: null",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(written, content, more, message):
    with pytest.raises(ValueError, match=message):
        zero.read_config(written(content, **more))


def test_bfloat16_is_autocast_over_whole_weights(written):
    config = zero.read_config(written(ZERO2, dtype="bfloat16"))
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert "bf16" not in config
    assert "torch_autocast" not in zero.read_config(written(ZERO2))


def test_without_a_compiler_the_error_says_what_is_missing(monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"lacks a C\+\+ compiler \(no-such-compiler\); 'zero_force"
    ):
        zero.build_cpu_adam()


def test_a_lock_that_a_killed_build_left_stops_nothing(tmp_path, monkeypatch):
    """A process dies in the middle of a build: its lock of torch's is removed, ours is free; and
    while one builds, the next waits."""
    builders = pytest.importorskip("deepspeed.ops.op_builder")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "cpu_adam"
    left = (
        "import fcntl, os, pathlib, signal, sys\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "folder.mkdir()\n"
        "fcntl.flock(open(folder.parent / 'hybrid_sleep.lock', 'w'), fcntl.LOCK_EX)\n"
        "(folder / 'lock').touch()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", left, str(folder)], check=False)
    assert (folder / "lock").exists()
    seen = []

    def load(self, verbose=True):
        seen.append((folder / "lock").exists())

    monkeypatch.setattr(builders.CPUAdamBuilder, "load", load)
    zero.build_cpu_adam()
    assert seen == [False]
    with open(tmp_path / "hybrid_sleep.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=zero.build_cpu_adam)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and seen == [False]
    waiting.join()
    assert seen == [False, False]


def test_deepspeeds_muon_makes_the_steps_of_ours(monkeypatch):
    """Outside ZeRO, both in fp32: in bf16 the iteration turns a last bit into a percent."""
    pytest.importorskip("deepspeed")
    import deepspeed.runtime.zero.muon.original_muon as theirs
    from torch.optim import _muon

    def iterate(G, steps=5, *arguments):
        a, b, c = 3.4445, -4.7750, 2.0315
        X = G.mT if G.shape[0] > G.shape[1] else G
        X = X / (X.norm() + 1e-7)
        for _ in range(steps):
            A = X @ X.mT
            X = a * X + (b * A + c * A @ A) @ X
        return X.mT if G.shape[0] > G.shape[1] else X

    monkeypatch.setattr(theirs, "zeropower_via_newtonschulz5", iterate)
    monkeypatch.setattr(
        _muon, "_zeropower_via_newtonschulz", lambda G, coefficients, steps, eps: iterate(G, steps)
    )
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 9))
    second = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 9))
    second.load_state_dict(first.state_dict())
    betas, eps = (0.9, 0.95), 1e-8
    ours = MuonAdamW(parameter_groups(first, 0.02, 0.003, 0.1), betas=betas, eps=eps)
    other = zero.muon(parameter_groups(second, 0.02, 0.003, 0.1), betas, eps)
    try:
        for _ in range(5):
            x = torch.randn(7, 6)
            for model, optimizer in ((first, ours), (second, other)):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
    finally:
        torch.compiler.set_stance("default")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
