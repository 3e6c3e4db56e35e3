"""DeepSpeed: what its JSON may say about a run, and how to start it where nothing can be built."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import importlib.util
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.support.io import read_json

if TYPE_CHECKING:
    import torch

    from hybrid_sleep.training.config import TrainConfig

# Said once, in the run's own config; DeepSpeed gets them from there.
FROM_RUN = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulate",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "train.grad_clip",
}
REFUSED = {
    "optimizer": "train.lr_muon and train.lr_adamw choose the optimizer",
    "scheduler": "train.schedule is the schedule",
    "activation_checkpointing": "it would drop fast weights; use train.activation_checkpointing",
    "torch_autocast": "train.dtype: bfloat16 sets it",
    "checkpoint": "resuming on another number of processes sets it",
}
HALF = ("fp16", "bf16", "amp")


def read_config(train: TrainConfig) -> dict[str, Any]:
    """The DeepSpeed config of a run: `train.deepspeed` checked and completed.

    Which optimizers it is for: AdamW under every ZeRO stage; Muon under stage 0 as ours, under 1 to
    3 as DeepSpeed's own, which sees whole matrices, but clips the norm of updates instead of
    gradients (so `train.grad_clip` must be null) and is not combined with offloading here.
    bfloat16 is torch's autocast over fp32 weights: DeepSpeed's `bf16` would round the decays of
    the state-space layers too.

    Raises FileNotFoundError if there is no such file, ValueError for what does not go together.
    """
    assert train.deepspeed is not None
    path = Path(train.deepspeed)
    where = f"train.deepspeed={str(path)!r}"
    if not path.is_file():
        raise FileNotFoundError(
            f"train.deepspeed must be a JSON file such as configs/deepspeed/*, got {str(path)!r}"
        )
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"train.deepspeed must be a JSON object: {error}") from error
    for key, why in REFUSED.items():
        if key in config:
            raise ValueError(f"{where} must leave {key!r} out, {why}")
    for key, source in FROM_RUN.items():
        if config.get(key, "auto") != "auto":
            raise ValueError(
                f"{where} must have {key}='auto', {source} decides, got {config[key]!r}"
            )
        config[key] = "auto"
    for key in HALF:
        if (config.get(key) or {}).get("enabled", False):
            raise ValueError(
                f"{where} must not enable {key!r}, which rounds all weights, those of the decays "
                "too: train.dtype: bfloat16 is autocast over fp32 weights"
            )
    zero = config.setdefault("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"{where} must have a zero_optimization.stage of 0 to 3, got {stage!r}")
    if stage == 3:
        _demand(zero, "stage3_gather_16bit_weights_on_model_save", True, where, "to save a model")
    if train.lr_muon is not None and stage > 0:
        _check_muon(zero, train, where)
    # AdamW of torch is one that DeepSpeed has not tested; tests/training has.
    config["zero_allow_untested_optimizer"] = True
    if train.dtype == "bfloat16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def stage(train: TrainConfig) -> int:
    """The ZeRO stage of a run that has `train.deepspeed`."""
    return read_config(train)["zero_optimization"].get("stage", 0)


def _check_muon(zero: dict[str, Any], train: TrainConfig, where: str) -> None:
    stage = zero["stage"]
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            raise ValueError(
                f"{where} must have no {key} with train.lr_muon={train.lr_muon}; lr_muon: null "
                "(AdamW) goes with it"
            )
    if train.grad_clip is not None:
        raise ValueError(
            f"train.grad_clip must be null for Muon under ZeRO stage {stage}, where DeepSpeed "
            "would clip the orthogonalised updates (lr_muon: null, AdamW, goes with clipping), got "
            f"{train.grad_clip}"
        )
    _demand(zero, "reduce_scatter", False, where, f"for Muon under ZeRO stage {stage}")


def _demand(zero: dict[str, Any], key: str, value: Any, where: str, why: str) -> None:
    if zero.setdefault(key, value) != value:
        raise ValueError(
            f"{where} must have zero_optimization.{key}={value!r} {why}, got {zero[key]!r}"
        )


def offloads_adam(config: dict[str, Any]) -> bool:
    """Whether DeepSpeed will run its own Adam on the processor, which it compiles first."""
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    forced = config.get("zero_force_ds_cpu_optimizer", True)
    return offload.get("device", "none") != "none" and forced


def choose_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, where it is installed and there is none.

    transformers imports it together with its Trainer, and it would warn of what it found.
    """
    if importlib.util.find_spec("deepspeed") is not None:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")


def prepare(config: dict[str, Any], device: str) -> None:
    """Import DeepSpeed so that it builds nothing that the run does not need.

    On a CPU its collectives in shared memory are left to gloo: building them takes minutes, and a
    lock that a killed build left behind would stop every later start. What offloading needs is
    built here, one process at a time. Raises ValueError naming what is missing.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "train.deepspeed needs the package deepspeed; pip install 'hybrid-sleep[deepspeed]'"
        )
    on_cpu = device == "cpu"
    if "RANK" not in os.environ:
        # One process without a launcher; DeepSpeed would look for MPI.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
            alone["MASTER_PORT"] = probe.getsockname()[1]
        os.environ |= {name: str(value) for name, value in alone.items()}
    warnings.filterwarnings("ignore", r".*torch\.distributed\..* is deprecated", FutureWarning)
    import deepspeed.comm  # noqa: F401

    communication: Any = sys.modules["deepspeed.comm.torch"]
    if on_cpu and hasattr(communication, "build_shm_op"):
        communication.build_shm_op = lambda: None
    if offloads_adam(config):
        build_cpu_adam()


def build_cpu_adam() -> None:
    """Compile DeepSpeed's Adam for the processor unless that was done before."""
    import torch.utils.cpp_extension as cpp

    compiler = os.environ.get("CXX", "c++")
    missing = [
        name
        for name, there in (
            (f"a C++ compiler ({compiler})", shutil.which(compiler)),
            ("ninja", cpp.is_ninja_available()),
        )
        if not there
    ]
    if missing:
        raise ValueError(
            "offload_optimizer takes DeepSpeed's Adam for the processor, which has to be compiled, "
            f"and this machine lacks {' and '.join(missing)}; "
            "'zero_force_ds_cpu_optimizer': false in the DeepSpeed JSON takes torch's AdamW, slower"
        )
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builder = CPUAdamBuilder()
    folder = Path(cpp._get_build_directory(builder.name, verbose=False))
    with _alone(folder.parent / "hybrid_sleep.lock"):
        # Whoever holds our lock is the only one who builds, so torch's own was left by a killed
        # process; torch would wait for it for ever.
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the system lets the lock go when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def muon(
    groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """DeepSpeed's Muon and AdamW over `parameter_groups`, for ZeRO stages 1 to 3.

    ZeRO hands an optimizer flat shares of the parameters; this one orthogonalises whole matrices
    before they are shared out. Same update as `MuonAdamW`, Newton-Schulz in bf16 included.
    """
    import torch
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if not torch.cuda.is_available():
        # Its functions are compiled by torch.compile, which on a CPU needs a C++ compiler.
        torch.compiler.set_stance("force_eager")
    translated = []
    for group in groups:
        is_muon = group.get("algorithm") == "muon"
        for parameter in group["params"]:
            parameter.use_muon = is_muon
        own = {"momentum": 0.95, "ns_method": "standard"}
        if not is_muon:
            own = {"betas": betas, "eps": eps}
        kept = {key: group[key] for key in ("lr", "weight_decay")}
        translated.append({"params": list(group["params"]), "use_muon": is_muon, **kept, **own})
    return MuonWithAuxAdam(translated)


def to_universal(checkpoint: Path) -> None:
    """Rewrite a DeepSpeed checkpoint so that any number of processes can load it.

    The converted copy lies inside `checkpoint`; what was there stays.
    """
    from types import SimpleNamespace

    from deepspeed.checkpoint.ds_to_universal import main

    tag = (checkpoint / "latest").read_text().strip()
    target = checkpoint / f"{tag}_universal"
    if (checkpoint / "latest_universal").is_file():
        return
    shutil.rmtree(target, ignore_errors=True)
    arguments = SimpleNamespace(
        input_folder=str(checkpoint / tag),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(sys.stderr):
        main(arguments)


def mend(optimizer: Any, decays: list[float]) -> None:
    """Undo what loading a universal checkpoint does to torch's AdamW under ZeRO-3 (0.19.8).

    All parameters get one and the same step counter, which each of them then advances, and every
    group the weight decay of the first. `decays`: each group's own.
    """
    while not isinstance(optimizer.state, dict) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = copy.deepcopy(state["step"])
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
