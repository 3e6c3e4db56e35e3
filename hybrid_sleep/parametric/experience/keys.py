"""The keys of a folder of experiences, a file each: without its key what was kept is noise.

    keys/1f0c....key      the key of a source
    keys/audit.key        the key of the trail's digests

They are no part of the database, whose journals and free pages would keep copies of them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Collection
from pathlib import Path

from hybrid_sleep.parametric import durable
from hybrid_sleep.parametric.experience.packages import needed
from hybrid_sleep.parametric.experience.shred import shred, sync_folder
from hybrid_sleep.support.io import unreadable

FOLDER, SUFFIX, AUDIT = "keys", ".key", "audit"
BYTES = 32
# AES-GCM's own (NIST SP 800-38D, 5.2.1.1): random nonces of 96 bits.
NONCE = 12


class Keys:
    """The keys in a folder, by name; each is read once."""

    def __init__(self, folder: Path):
        self.folder = folder / FOLDER
        self._read: dict[str, bytes] = {}

    def make(self, name: str | None = None) -> str:
        """A new key, durable on return, for this user alone; returns its name."""
        name = name or secrets.token_hex(16)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        durable.reached("before key")
        handle = os.open(self._path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(handle, "wb") as file:
            file.write(secrets.token_bytes(BYTES))
            file.flush()
            os.fsync(handle)
        sync_folder(self.folder)
        sync_folder(self.folder.parent)
        durable.reached("after key")
        return name

    def joint(self, names: Collection[str]) -> str:
        """A key made of those of all `names`, by its name; it is never on the disk, and nobody has
        it any more once one of them is gone."""
        ordered = sorted(set(names))
        name = f"joint:{'+'.join(ordered)}"
        parts = b"".join(map(self._key, ordered))
        self._read[name] = hmac.new(parts, b"joint", hashlib.sha256).digest()
        return name

    def seal(self, name: str, plain: bytes, about: str) -> bytes:
        """`plain` encrypted by AES-256-GCM, to be opened by the same key and `about` alone."""
        with needed("cryptography"):
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = secrets.token_bytes(NONCE)
        return nonce + AESGCM(self._key(name)).encrypt(nonce, plain, about.encode())

    def unseal(self, name: str, sealed: bytes, about: str) -> bytes:
        """What `seal` encrypted; ValueError if the key, `about` or a byte of it is another."""
        with needed("cryptography"):
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        try:
            nonce, rest = sealed[:NONCE], sealed[NONCE:]
            return AESGCM(self._key(name)).decrypt(nonce, rest, about.encode())
        except (InvalidTag, ValueError) as error:
            raise ValueError(
                f"what was kept must be as it was encrypted with {self._path(name)}, got other "
                "bytes: it is damaged, or not where it was written"
            ) from error

    def digest(self, about: str) -> bytes:
        """HMAC-SHA256 of `about` with the trail's key."""
        return hmac.new(self._key(AUDIT), about.encode(), hashlib.sha256).digest()

    @property
    def auditable(self) -> bool:
        """Whether the trail has a key."""
        return self._path(AUDIT).exists()

    def destroy_others(self, used: Collection[str]) -> None:
        """Erase all keys of sources that are not `used`."""
        if not self.folder.exists():
            return
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.stem not in (*used, AUDIT):
                self._read.pop(path.stem, None)
                shred(path)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _key(self, name: str) -> bytes:
        if name not in self._read:
            path = self._path(name)
            try:
                key = path.read_bytes()
            except OSError as error:
                raise unreadable(path, error) from error
            if len(key) != BYTES:
                raise unreadable(path, f"a key has {BYTES} bytes, this one {len(key)}")
            self._read[name] = key
        return self._read[name]
