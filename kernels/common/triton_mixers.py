"""A step of generation, the same for the Triton paths of both mixers."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from hybrid_sleep.kernels.common.mixers import Dims, Mixed
from hybrid_sleep.kernels.common.triton_launch import Kernel, Precision, empty, next_power
from hybrid_sleep.kernels.common.triton_sizes import contiguous


def step(
    kernel: Kernel,
    raw: Any,
    mask: Tensor | None,
    dims: Dims,
    how: Precision,
    output: bool,
    tails: bool,
    **more: Any,
) -> Mixed:
    """One token a row in one launch of `kernel`, which takes the tensors of `raw` by their names,
    and `more`.
    """
    B, _, G, K, H, V, W = dims
    named = {name: contiguous(x) for name, x in raw._asdict().items()}
    q, kv, initial = named["q"], named["kv"], named.pop("initial_state")
    o = empty(kv, (B, 1, H, V), kv.dtype) if output else None
    S = empty(kv, (B, H, K, V), how.state)
    new_kv = empty(kv, (B, W - 1, kv.shape[2]), kv.dtype) if tails else None
    new_q = empty(q, (B, W - 1, G * K), q.dtype) if tails and q is not None else None
    kernel.launch(
        lambda meta: (B * H, triton.cdiv(V, meta["BV"])),
        **named, **more, mask=mask, initial=initial, out=o, final=S,
        new_q_tail=new_q, new_kv_tail=new_kv, q_b=G * K, kv_b=kv.shape[2],
        busy=min(1024, triton.next_power_of_2(B * H)),
        H=H, R=H // G, K=K, V=V, W=W, BK=next_power(K),
        HAS_Q_TAIL=raw.q_tail is not None, HAS_KV_TAIL=raw.kv_tail is not None,
        HAS_MASK=mask is not None, HAS_INITIAL=initial is not None,
        READS=q is not None and (output or tails), OUT=output, TAILS=tails, ACC=how.ACC,
    )  # fmt: skip
    if tails and q is None:
        new_q = raw.q_tail
    return Mixed(o, S, new_q, new_kv)
