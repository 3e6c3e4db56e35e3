"""A folder of files that hold ciphertext alone, each whole or not there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.parametric import durable
from hybrid_sleep.parametric.experience.shred import shred
from hybrid_sleep.support.io import atomic_path, unreadable

if TYPE_CHECKING:
    from torch import Tensor

    from hybrid_sleep.parametric.experience.keys import Keys

LENGTH = 8
# Far below the 2 GiB that AES-GCM of cryptography encrypts at once.
PART = 1 << 26


class Sealed:
    """Files in `folder`, encrypted by AES-256-GCM with the key `name` of `keys`.

    A file is a sequence of parts, each bound to its place, to the file and to what is said `about`
    it: one that was cut short, or is another's, cannot be read.
    """

    def __init__(self, folder: Path, keys: Keys, name: str):
        self.folder, self._keys, self._name = folder, keys, name

    def write(self, file: str, parts: Iterable[bytes], about: str) -> None:
        """Write the file named `file`, atomically and durably."""
        path = self.folder / file
        durable.reached(f"before {file}")
        with atomic_path(path) as partial:
            with open(partial, "wb") as out:
                for place, part in _numbered(file, parts, about):
                    sealed = self._keys.seal(self._name, part, place)
                    out.write(len(sealed).to_bytes(LENGTH, "big") + sealed)
            durable.reached(f"within {file}")
        durable.reached(f"after {file}")

    def read(self, file: str, about: str) -> Iterator[bytes]:
        """The parts of a file; ValueError, or OSError, naming it, for one that is missing, damaged
        or about something else."""
        path = self.folder / file
        try:
            with open(path, "rb") as source:
                parts = iter(lambda: source.read(int.from_bytes(source.read(LENGTH), "big")), b"")
                for place, part in _numbered(file, parts, about):
                    yield self._keys.unseal(self._name, part, place)
        except OSError as error:
            raise unreadable(path, error) from error
        except (ValueError, MemoryError, OverflowError) as error:
            raise unreadable(path, "it was changed, or is about something else") from error

    def write_tensors(
        self, file: str, tensors: Mapping[str, Tensor], told: Mapping[str, Any], about: str
    ) -> None:
        """Write `tensors` and what is `told` with them, which JSON must have."""
        shapes = {name: (str(x.dtype), tuple(x.shape)) for name, x in tensors.items()}
        head = json.dumps({"tensors": shapes, "told": told}, allow_nan=False).encode()
        self.write(file, _bytes_of(head, tensors), about)

    def read_tensors(self, file: str, about: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `write_tensors` wrote, on the CPU. Raises as `read` does."""
        import torch

        parts = self.read(file, about)
        head = json.loads(next(parts, b"{}"))
        found = {}
        for name, (kind, shape) in head["tensors"].items():
            dtype = getattr(torch, kind.removeprefix("torch."))
            size, data = math.prod(shape) * dtype.itemsize, bytearray()
            while len(data) < size:
                data += next(parts)
            flat = torch.frombuffer(data, dtype=dtype) if size else torch.empty(0, dtype=dtype)
            found[name] = flat.reshape(shape)
        return found, head["told"]

    def erase_partial(self) -> None:
        """Erase what a killed writer left."""
        for path in sorted(self.folder.glob(".*")):
            shred(path)

    def erase(self) -> None:
        """Erase all files; nothing happens where there are none."""
        shred(self.folder)


def _numbered(file: str, parts: Iterable[bytes], about: str) -> Iterator[tuple[str, bytes]]:
    """Each part behind its place, of which the last one is known to be the last."""
    ahead, number = iter(parts), 0
    part = next(ahead, b"")
    for following in ahead:
        yield f"{file}:{number}:more:{about}", part
        part, number = following, number + 1
    yield f"{file}:{number}:last:{about}", part


def _bytes_of(head: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    import torch

    yield head
    for x in tensors.values():
        flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for part in flat.split(PART):
            if len(part):
                yield part.numpy().tobytes()
