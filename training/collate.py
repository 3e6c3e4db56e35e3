"""What a data collator adds for a model that sleeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MarkSupervised:
    """A data collator that also says which tokens a loss is computed on.

    collator: makes batches with `labels`, -100 where unsupervised. `supervised: [B, T]` is added,
    from which the model knows which windows may sleep where Trainer keeps the labels to itself:
    with label smoothing, with `compute_loss_func`, and in trl's SFTTrainer.

        Trainer(model, args, data_collator=MarkSupervised(collator), ...)

    Raises ValueError where a batch has no labels.
    """

    collator: Callable[..., dict[str, Any]]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = self.collator(*args, **kwargs)
        if batch.get("labels") is None:
            raise ValueError(
                "MarkSupervised needs a collator that makes `labels`, got a batch of "
                f"{', '.join(batch)}"
            )
        batch["supervised"] = batch["labels"] != -100
        return batch
