"""The records of `metrics.jsonl` as TensorBoard scalars."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any


class TensorBoardLog:
    """Writes records to `folder` as scalars, each number under the path of its keys.

    Tags are `loss`, `lr/muon`, `exact/4`, `loss_by_position/0`, `memory/peak` and so on, as the
    records of `RunLog` have them. Use it as a context, which closes the file. A run that goes on
    from step s hides what an earlier process wrote beyond s (TensorBoard's purge). Raises
    ValueError if tensorboard is missing.
    """

    def __init__(self, folder: str | os.PathLike):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"writing TensorBoard events needs a package that is missing ({error}): "
                "pip install 'hybrid-sleep[train]'"
            ) from error
        self.folder, self._make, self._writer = folder, SummaryWriter, None

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def start(self, step: int) -> None:
        """Begin after `step` steps, which is not 0 when a run goes on."""
        self._writer = self._make(str(self.folder), purge_step=step + 1)

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Write every number in `records` at the record's `step`; needs `start`."""
        for record in records:
            for tag, value in _scalars(record):
                if tag != "step":
                    self._writer.add_scalar(tag, value, record["step"])
        self._writer.flush()


def _scalars(value: Any, tag: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _scalars(inner, f"{tag}/{key}" if tag else str(key))
    elif isinstance(value, (int, float)):
        yield tag, value
