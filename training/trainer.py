"""transformers' Trainer for models that sleep: a depth for every step, Muon, whole checkpoints."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from hybrid_sleep.training.data import HeldOut, TaskBatches, only_item
from hybrid_sleep.training.depth import DepthPolicy, parse_depth
from hybrid_sleep.training.optimizer import MuonAdamW, parameter_groups

STAGING = ".partial"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass
class StepRecord:
    """What a training step did: its index (0 for the first), depth, tokens read and mean loss."""

    step: int
    depth: int
    tokens: int
    loss: torch.Tensor


class SleepTrainer(Trainer):
    """`transformers.Trainer` whose model sleeps at a depth drawn anew for every step.

    Args (beside Trainer's):
        sleep_passes: a depth, a `DepthPolicy`, or what `parse_depth` reads; drawn from
            (`args.seed`, step), so that ranks agree and a resumed run draws the same. Evaluation
            uses the depth of the model's config, or the depths of a `HeldOut`.
        lr_muon: if given, matrices are trained by Muon at this rate and the rest by AdamW at
            `args.learning_rate` (see `parameter_groups`); otherwise `args.optim` decides.

    `train_dataset` may be a `TaskBatches`, whose items are batches already; `eval_dataset` may be a
    `HeldOut`, for exact accuracy by depth. A checkpoint is written beside its place and renamed, so
    that each one found is complete, and one with weights that are not finite is never written.
    `resume_from_checkpoint` goes on bit for bit as if nothing had stopped, on a CPU.

    Raises ValueError for transformers' activation checkpointing: the model carries fast weights
    from pass to pass and window to window, which that would drop;
    `model.set_activation_checkpointing` keeps them.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        sleep_passes: Any = 1,
        lr_muon: float | None = None,
        **kwargs: Any,
    ):
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if getattr(args, name, False):
                raise ValueError(
                    f"{name}=True; allowed: False, because transformers' checkpointing would drop "
                    "the fast weights that windows and passes hand on. Call "
                    "model.set_activation_checkpointing('block') or ('pass') instead"
                )
        if lr_muon is not None and not lr_muon > 0:
            raise ValueError(f"lr_muon={lr_muon!r}; allowed: None or a number > 0")
        self.policy: DepthPolicy = parse_depth(sleep_passes)
        self.lr_muon = lr_muon
        self.last_step: StepRecord | None = None
        self._staging: Path | None = None
        super().__init__(model, args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.lr_muon is not None:
            groups = parameter_groups(
                self.model if model is None else model,
                self.lr_muon,
                self.args.learning_rate,
                self.args.weight_decay,
            )
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = MuonAdamW(groups, betas=betas, eps=self.args.adam_epsilon)
        return super().create_optimizer(model)

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, TaskBatches):
            return super().get_train_dataloader()
        # Batches are made in microseconds to milliseconds and differ by rank already; workers and
        # accelerate's sharding would only cost time.
        pin = torch.cuda.is_available() and not self.args.use_cpu
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=only_item, pin_memory=pin)

    def depth(self) -> int:
        """The depth of the current training step."""
        return self.policy.draw(self.args.seed, self.state.global_step)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = {**inputs, "sleep_passes": self.depth(), "use_cache": False}
        return super().compute_loss(model, given, return_outputs, num_items_in_batch)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        tokens = inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, *args)
        step, last = self.state.global_step, self.last_step
        if last is None or last.step != step:
            self.last_step = StepRecord(step, self.depth(), tokens, loss)
        else:
            # A later micro-batch of the same step; Trainer has scaled each by its share.
            last.tokens += tokens
            last.loss = last.loss + loss
        return loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Trainer's, or for a `HeldOut`: `eval_exact_N`, `eval_per_label_N` for each depth N."""
        held_out = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(held_out, HeldOut):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = {}
        for depth, score in accuracy_by_depth(self.model, held_out).items():
            metrics |= {f"{metric_key_prefix}_{name}_{depth}": x for name, x in score.items()}
        self.log(metrics)
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        check_finite(self.model, f"step {self.state.global_step}")
        run_dir = Path(self._get_output_dir(trial))
        place = run_dir / f"checkpoint-{self.state.global_step}"
        if place.exists():
            return
        staging = run_dir / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = best = str(run_dir / Path(best).name)
        if self.args.should_save:
            if best is not None:
                self.state.save_to_json(str(staging / place.name / "trainer_state.json"))
            publish(staging / place.name, place)
            shutil.rmtree(staging, ignore_errors=True)
            limit = self.args.save_total_limit
            if limit:
                for old in checkpoints(run_dir)[:-limit]:
                    if str(old) != best:
                        shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


@torch.no_grad()
def accuracy_by_depth(model: Any, held_out: HeldOut) -> dict[int, dict[str, float]]:
    """`{depth: {"exact": ..., "per_label": ...}}` of `model` on `held_out`, labels given in turn.

    The model is left in the mode (train or eval) it came in.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    scores = {}
    try:
        for depth in held_out.depths:
            guesses, answers = [], []
            for batch in held_out.batches():
                ids = batch["input_ids"].to(device)
                logits = model(input_ids=ids, sleep_passes=depth, use_cache=False).logits
                # Position t holds the guess for token t, made from the tokens before it.
                guess = torch.zeros_like(ids)
                guess[:, 1:] = logits[:, :-1].argmax(-1)
                guesses.append(guess.cpu())
                answers.append(batch["labels"])
            answers = {"labels": torch.cat(answers)}
            scores[depth] = held_out.task.score(torch.cat(guesses), answers)
    finally:
        model.train(was_training)
    return scores


def check_finite(model: torch.nn.Module, where: str) -> None:
    """Raise ValueError, naming the parameter, if a weight of `model` is nan or infinite."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"weight {name} is not finite at {where}, so nothing was saved; try a lower "
                "lr_muon or lr_adamw, a longer warmup or a smaller grad_clip"
            )


def checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints in a run's folder, oldest first; all of them are complete."""
    found = [path for path in Path(run_dir).glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def publish(source: Path, place: Path) -> None:
    """Give the finished folder `source` its name `place` in one step, contents on disk first."""
    for path in source.rglob("*"):
        if path.is_file():
            with open(path, "rb") as written:
                os.fsync(written.fileno())
    os.replace(source, place)
