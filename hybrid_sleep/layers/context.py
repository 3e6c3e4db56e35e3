"""What all layers of our model share in one pass over one block of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hybrid_sleep.sleep.masks import AttentionMask


class Context(NamedTuple):
    """Positions and masks of T tokens a row.

    A tuple, so that the hooks of a device map take its tensors along from device to device.

    cos, sin: `[B or 1, T, head_dim]`, of the rotary embedding.
    attention: see `AttentionMask`.
    mask: bool `[B, T]`, False on the pads behind a row's last token; None without pads.
    keep_tails: whether convolution tails outlive this pass.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    attention: AttentionMask
    mask: torch.Tensor | None
    keep_tails: bool
