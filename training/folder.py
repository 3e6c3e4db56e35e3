"""A run's folder: its checkpoints, each whole or not, and how one run takes another's place."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from hybrid_sleep.support.io import read_json, unreadable, write_json_atomic, write_text_atomic
from hybrid_sleep.training.weights import CONFIG_FILE, INDEX_FILE

RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
FIGURE_FILE = "run.png"
SAMPLES_FILE = "samples.txt"
TENSORBOARD = "tensorboard"
# Beside Trainer's files in a checkpoint: how many processes wrote it, and where in its text it is.
STATE_FILE = "sleep_state.json"
# What else was written: in a checkpoint size and SHA-256 by name, in a run's folder the names.
LIST_FILE = "run_files.json"
STAGING = ".partial"
# Where a run lies that is to replace an earlier one, until it is finished.
UNFINISHED = "unfinished"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
# What every run writes, in its list or not; runs of versions without a list wrote all of it.
ALWAYS = {METRICS_FILE, FIGURE_FILE, SAMPLES_FILE, LIST_FILE, STAGING}
ALWAYS |= {CONFIG_FILE, INDEX_FILE, "generation_config.json", "modeling_hybrid_sleep.py"}


def checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints in a run's folder, oldest first; each was complete when it got its name."""
    found = [path for path in Path(run_dir).glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    found = [path for path in found if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def weights_in(folder: Path) -> list[Path]:
    """The files of the model that a run wrote into `folder`; they come last, so it is whole."""
    return sorted(path for path in folder.glob("model*") if WEIGHTS.fullmatch(path.name))


def publish(source: Path, place: Path) -> None:
    """Give the finished file or folder `source` its name `place` in one step, contents on disk."""
    for path in (source, *source.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    os.replace(source, place)


@contextlib.contextmanager
def written(what: str, run_dir: str | os.PathLike) -> Iterator[None]:
    """Turn a failure to write `what` into an OSError that says where the run can go on."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors have their own names for a disk that is full.
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{what} could not be written: {reason}; {last_good(run_dir)}") from error


def last_good(run_dir: str | os.PathLike) -> str:
    """A text that says where a run that fails can be resumed."""
    saved = checkpoints(run_dir)
    if not saved:
        return "no checkpoint was saved yet"
    return f"the last good checkpoint is {saved[-1]}, --resume goes on from there"


def list_files(folder: Path) -> None:
    """Write down what is in `folder`, so that a file which is lost or changed later is noticed."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in paths}
    write_json_atomic(folder / LIST_FILE, found)


def check_checkpoint(checkpoint: Path) -> None:
    """ValueError, saying what is wrong and which other one is whole, unless `checkpoint` is whole.

    Whole is one that has every file it was written with, to the byte.
    """
    wrong = _wrong_with(checkpoint)
    if wrong is None:
        return
    others = [path for path in reversed(checkpoints(checkpoint.parent)) if path != checkpoint]
    whole = next((path for path in others if _wrong_with(path) is None), None)
    other = "no other one is whole; --overwrite starts anew"
    if whole is not None:
        other = f"{whole} is whole: remove {checkpoint.name}, and --resume goes on there"
    raise ValueError(
        f"checkpoint {checkpoint} must be whole for the run to go on as it was: {wrong}; {other}"
    )


def _wrong_with(checkpoint: Path) -> str | None:
    try:
        listed = read_json(checkpoint / LIST_FILE)
        if STATE_FILE not in listed:
            raise unreadable(checkpoint / LIST_FILE, f"it does not name {STATE_FILE}")
        for name, before in listed.items():
            path = checkpoint / name
            if not path.is_file():
                raise unreadable(path, "it is no file")
            if _fingerprint(path) != before:
                raise unreadable(path, "it is not as it was written")
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _fingerprint(path: Path) -> list[int | str]:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            return [file.tell(), digest.hexdigest()]
    except OSError as error:
        raise unreadable(path, error) from error


def check_folder(out: Path, overwrite: bool) -> None:
    """FileExistsError if `out` holds an earlier run, or with `overwrite` a model of no run."""
    old = _earlier(out)
    if old and not overwrite:
        raise FileExistsError(
            f"output_dir must be a folder without a run, got {str(out)!r} with {old[-1].name}: "
            "resume=True goes on from its last checkpoint, overwrite=True replaces it"
        )
    if old and not (out / RUN_FILE).exists():
        raise FileExistsError(
            f"output_dir must be the folder of a run to be overwritten, got {str(out)!r} with "
            f"{old[-1].name} but no {RUN_FILE}, so that no run wrote it"
        )


def _earlier(out: Path) -> list[Path]:
    return [*checkpoints(out), *weights_in(out)]


def working(out: Path) -> Path:
    """Where the run of `out` lies as long as it is not finished."""
    return out / UNFINISHED if (out / UNFINISHED / RUN_FILE).exists() else out


def begin(out: Path, config: str) -> Path:
    """Make the folder of a run that starts anew and leave its `config` there; returns it.

    That is `out`, or a folder in it where an earlier run is to be replaced: what that one wrote
    stays until the new one is finished and `settle` is called.
    """
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    work = out / UNFINISHED if _earlier(out) else out
    write_text_atomic(work / RUN_FILE, config)
    return work


def settle(out: Path) -> None:
    """Give a finished run that replaces an earlier one its place, if there is one.

    Killed, it can be called again. Until then `out` holds the earlier model, the new one or none,
    and what no run wrote stays.
    """
    work = out / UNFINISHED
    if not work.is_dir() or (work / RUN_FILE).exists() and not weights_in(work):
        return
    if (work / RUN_FILE).exists():
        for path in [*weights_in(out), *checkpoints(out), *_others(out)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        # From here on what lies in `out` is of the new run.
        os.replace(work / RUN_FILE, out / RUN_FILE)
    late = {path.name for path in weights_in(work)}
    for path in sorted(work.iterdir(), key=lambda path: path.name in late):
        if path.is_dir() and (out / path.name).is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
            shutil.rmtree(path)
        else:
            os.replace(path, out / path.name)
    work.rmdir()


def _others(out: Path) -> list[Path]:
    """What a run wrote into `out` besides weights, checkpoints and its config."""
    names = set(ALWAYS)
    with contextlib.suppress(OSError, ValueError):
        names |= {name for name in read_json(out / LIST_FILE, list) if isinstance(name, str)}
    return [path for path in out.iterdir() if path.name in names - {RUN_FILE, UNFINISHED}]
