"""The inputs that a short convolution has to remember: the last W - 1 real ones of each row."""

from __future__ import annotations

import torch
from torch import Tensor


def tail_after(x_BTE: Tensor, state_BWE: Tensor | None, mask_BT: Tensor | None, W: int) -> Tensor:
    """[B, W - 1, E] in x's dtype: of `state` (None: zeros) followed by x, the last real tokens.

    A new tensor: a kept tail must not keep the whole sequence in memory. Differentiable.
    """
    B, T, E = x_BTE.shape
    kept = W - 1
    if mask_BT is None and kept <= T:
        return x_BTE[:, T - kept :].clone()
    if state_BWE is None:
        state_BWE = x_BTE.new_zeros(B, kept, E)
    state_BWE = state_BWE.to(x_BTE.dtype)
    if kept == 0:
        return state_BWE
    if mask_BT is None:
        return torch.cat([state_BWE[:, T:], x_BTE], 1)
    real_B1 = mask_BT.sum(1, keepdim=True)
    # Where each token goes: real ones to the end of the tail, all others to a slot thrown away.
    slot_BT = mask_BT.cumsum(1) - 1 - real_B1 + kept
    slot_BT = slot_BT.where(mask_BT & (slot_BT >= 0), kept)
    token_BT = torch.arange(T, device=x_BTE.device).expand(B, T)
    token_BW = token_BT.new_full((B, kept + 1), -1).scatter(1, slot_BT, token_BT)[:, :kept]
    from_x_BWE = x_BTE.gather(1, token_BW.clamp(min=0)[:, :, None].expand(B, kept, E))
    older_BW = (real_B1 + torch.arange(kept, device=x_BTE.device)).clamp(max=kept - 1)
    from_state_BWE = state_BWE.gather(1, older_BW[:, :, None].expand(B, kept, E))
    return from_x_BWE.where(token_BW[:, :, None] >= 0, from_state_BWE)
