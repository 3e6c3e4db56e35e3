"""Optional packages that compute the same ops, behind the same dispatcher.

Each op has at most one. A package is looked up when a call could use it, imported when it is about
to run, and never needed: `impl="auto"` takes it only on a CUDA device and only where the Triton
kernels decline the call, and `impl=` its name forces it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib import metadata, util
from typing import NamedTuple

import torch
from packaging.specifiers import SpecifierSet

from hybrid_sleep.kernels.common import dispatch
from hybrid_sleep.kernels.peers import causal_conv1d, fla, mamba_ssm

__all__ = ["PEERS", "Peer", "import_error", "register", "version"]

RANK = 25


class Peer(NamedTuple):
    """A package, and the adapter that calls it.

    versions: the releases whose signatures the adapter was written from.
    module: what the adapter imports.
    limits: why the package cannot compute a call that is on a CUDA device, or None.
    """

    name: str
    distribution: str
    versions: str
    module: str
    run: Callable
    limits: Callable[[dispatch.Call], str | None]

    @property
    def package(self) -> str:
        """The import name of the package."""
        return self.module.partition(".")[0]


PEERS = {
    "gated_delta_rule": Peer(
        "fla",
        "flash-linear-attention",
        ">=0.6,<0.7",
        fla.MODULE,
        fla.gated_delta_rule,
        fla.limits,
    ),
    "ssd": Peer(
        "mamba_ssm", "mamba-ssm", ">=2.3,<2.4", mamba_ssm.MODULE, mamba_ssm.ssd, mamba_ssm.limits
    ),
    "short_conv": Peer(
        "causal_conv1d",
        "causal-conv1d",
        ">=1.7,<1.8",
        causal_conv1d.MODULE,
        causal_conv1d.short_conv,
        causal_conv1d.limits,
    ),
}


def register(op: str) -> None:
    """Register the peer of `op` below the Triton kernels and above the chunked path."""
    peer = PEERS[op]
    dispatch.register(
        op,
        peer.name,
        peer.run,
        rank=RANK,
        wants=functools.partial(_wants, peer),
        rejects=functools.partial(_rejects, peer),
    )


def _wants(peer: Peer, call: dispatch.Call) -> str | None:
    # The import comes last: it may be slow, and it may fail on a machine that has no such call.
    if _rejects(peer, call) is not None or import_error(peer.module) is not None:
        return None
    return f"{peer.distribution} has kernels for this call, and no better ranked path takes it"


def _rejects(peer: Peer, call: dispatch.Call) -> str | None:
    if call.device != "cuda":
        return f"{peer.distribution} needs a CUDA device"
    if torch.compiler.is_compiling():
        return f"torch.compile cannot trace {peer.distribution}"
    found = version(peer.package, peer.distribution)
    if found is None:
        return f"the package {peer.distribution} is not installed"
    if not SpecifierSet(peer.versions).contains(found, prereleases=True):
        return f"{peer.distribution} {found} is outside the versions known here ({peer.versions})"
    if peer.module in _failed:
        return _failed[peer.module]
    if call.dtype == torch.float64:
        return f"{peer.distribution} does not compute in float64"
    return peer.limits(call)


@functools.cache
def version(package: str, distribution: str) -> str | None:
    """The installed version of `distribution`, if its `package` can be found; nothing is imported.

    Cached: the dispatcher looks at every call.
    """
    if util.find_spec(package) is None:
        return None
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


_failed: dict[str, str] = {}


def import_error(module: str) -> str | None:
    """Import `module`; what went wrong, or None. A failure is remembered and not tried again."""
    if module not in _failed:
        try:
            importlib.import_module(module)
            return None
        # Kernel packages fail to import in every way there is: a driver, a compiler, an ABI.
        except Exception as error:
            _failed[module] = f"importing {module} failed: {type(error).__name__}: {error}"
    return _failed[module]
