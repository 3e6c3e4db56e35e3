"""The least time an op can take on a device: what it must move, and what it must multiply.

Bytes count every input read once and every result written once, with no cache in between; flops
count the matrix products of the chunked form on dense tiles of C = 64 tokens (a smaller C
multiplies less, on tiles too small for the matrix units). Both limits are measured on the device in
the run that uses them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hybrid_sleep.kernels.benchmarks.cases import BOTH, STATE, WIDTH, Shape
from hybrid_sleep.kernels.benchmarks.timing import median_and_quartiles, on_cpu, timer

CHUNK = 64
STATE_BYTES = 4
GATE_BYTES = 4
# A derivative of a product is two products, and nothing need be computed again.
FLOPS_OF_BOTH = 3


class Cost(NamedTuple):
    """The least of one call."""

    bytes: float
    flops: float


class Limits(NamedTuple):
    """Bytes a second of a large copy, read and written, and flops a second of a large product."""

    bandwidth: float
    rate: float


def gated_delta_rule(shape: Shape, direction: str, size: int) -> Cost:
    """Of q, k, v, o in `size` bytes a number, g and beta in 4, K = V = d.

    Per token and head forward moves size (2K + 2V) + 8 bytes: q, k, v, o, g and beta (1032 for 2
    bytes and 128). Without output q and o go: size (K + V) + 8 (520). The backward pass reads q, k,
    v, g, beta and the gradient of o, and writes five gradients: size (4K + 3V) + 16 more. A head's
    [K, V] state is read and written once, and so is its gradient by the backward pass.

    Flops per token and head are those of K K^T (2CK), its inverse (2C^2 / 3), that times V (2CV),
    W S and K^T V' (2KV each), and with output Q S (2KV), Q K^T (2CK) and P V' (2CV): at C = 64 and
    128, 166.6 thousand, and 101.0 thousand for the state alone.
    """
    T, B, H, d = shape
    K = V = d
    moved = _moved(shape, direction, keys=K, size=size, gates=2)
    flops = 2 * CHUNK * K + 2 * CHUNK**2 / 3 + 2 * CHUNK * V + 4 * K * V
    if direction != STATE:
        flops += 2 * K * V + 2 * CHUNK * K + 2 * CHUNK * V
    return Cost(moved, _flops(B * T * H * flops, direction))


def ssd(shape: Shape, direction: str, size: int) -> Cost:
    """As `gated_delta_rule`, with one gate, and with q and k shared by all H heads.

    Per token and head forward moves size (2K / H + 2V) + 4 bytes, without output size (K / H + V)
    + 4, and the backward pass size (4K / H + 3V) + 8 more. Flops are those of K^T V (2KV), and with
    output Q S (2KV), Q K^T (2CK / H) and P V (2CV).
    """
    T, B, H, d = shape
    K = V = d
    moved = _moved(shape, direction, keys=K / H, size=size, gates=1)
    flops: float = 2 * K * V
    if direction != STATE:
        flops += 2 * K * V + 2 * CHUNK * K / H + 2 * CHUNK * V
    return Cost(moved, _flops(B * T * H * flops, direction))


def short_conv(shape: Shape, direction: str, size: int) -> Cost:
    """Of 3 H d channels: x in and y out, 2 size bytes a token and channel; the backward pass reads
    x and a gradient and writes another, 3 size more. 2 W flops a token and channel."""
    T, B, H, d = shape
    channels = 3 * H * d
    moved = (5 if direction == BOTH else 2) * size
    return Cost(
        B * T * channels * moved + B * (WIDTH - 1) * channels * 2 * size,
        _flops(B * T * channels * 2 * WIDTH, direction),
    )


def gated_delta_net(shape: Shape, direction: str, size: int) -> Cost:
    """As `gated_delta_rule`, of raw q, k and v, convolved on the way (2 W flops a channel), and of
    two raw gates in `size` bytes a number. Parameters and tails are not counted."""
    T, B, H, d = shape
    rule = gated_delta_rule(shape, direction, size)
    moved = _moved(shape, direction, keys=d, size=size, gates=2, gate_bytes=size)
    return Cost(moved, rule.flops + _convolved(shape, direction, keys=d))


def mamba2(shape: Shape, direction: str, size: int) -> Cost:
    """As `ssd`, of raw q, k and v, convolved on the way (2 W flops a channel), and of one raw gate
    in `size` bytes a number. Parameters and tails are not counted."""
    T, B, H, d = shape
    rule = ssd(shape, direction, size)
    moved = _moved(shape, direction, keys=d / H, size=size, gates=1, gate_bytes=size)
    return Cost(moved, rule.flops + _convolved(shape, direction, keys=d / H))


def _convolved(shape: Shape, direction: str, keys: float) -> float:
    T, B, H, d = shape
    channels = keys + d + (0 if direction == STATE else keys)
    return _flops(B * T * H * channels * 2 * WIDTH, direction)


def _moved(
    shape: Shape, direction: str, keys: float, size: int, gates: int, gate_bytes: int = GATE_BYTES
) -> float:
    T, B, H, d = shape
    read_and_written = size * (keys + d) + gate_bytes * gates
    states = 2
    if direction != STATE:
        read_and_written += size * (keys + d)
    if direction == BOTH:
        read_and_written += size * (4 * keys + 3 * d) + 2 * gate_bytes * gates
        states = 4
    return B * H * (T * read_and_written + states * STATE_BYTES * d * d)


def _flops(forward: float, direction: str) -> float:
    return forward * FLOPS_OF_BOTH if direction == BOTH else forward


def floor_seconds(cost: Cost, limits: Limits) -> float:
    """The longer of moving and multiplying, each at its measured limit, perfectly overlapped."""
    return max(cost.bytes / limits.bandwidth, cost.flops / limits.rate)


def measure(device: Any, copied: int = 2**31, side: int = 8192, repeats: int = 20) -> Limits:
    """Limits of `device`: copying `copied` bytes within it, and a bf16 product of random [side,
    side] matrices (zeros would be multiplied faster), medians of `repeats`."""
    time_one = timer(device)

    def median(work: Any) -> float:
        for _ in range(3):
            on_cpu(work)
        return median_and_quartiles([time_one(work) for _ in range(repeats)])[0]

    pair = torch.empty(2, copied, dtype=torch.int8, device=device)
    bandwidth = 2 * copied / median(lambda: pair[1].copy_(pair[0]))
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = torch.empty_like(a)
    rate = 2 * side**3 / median(lambda: torch.mm(a, b, out=product))
    return Limits(bandwidth, rate)
