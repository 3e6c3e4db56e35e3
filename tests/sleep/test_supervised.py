"""Which windows sleep follows from what is supervised, whoever computes the loss."""

from __future__ import annotations

import pytest
import torch
from small import small_ids, small_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.sleep import forward
from hybrid_sleep.training import MarkSupervised, SleepTrainer

IDS = small_ids(2, 17)
LABELS = IDS.clone()
LABELS[0, :11], LABELS[1, 6:10] = -100, -100


def model_of(**changes) -> HybridSleepForCausalLM:
    return small_model(dtype=torch.float32, sleep_passes=3, **changes)


def trainer_of(model, folder, kind=Trainer, compute_loss_func=None, **changes) -> Trainer:
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", **changes)
    if kind is SleepTrainer:
        return kind(model, arguments, sleep_passes=3, compute_loss_func=compute_loss_func)
    return kind(model, arguments, compute_loss_func=compute_loss_func)


def smoothed(logits: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Label smoothing written out token by token (Szegedy et al., arXiv 1512.00567)."""
    losses = []
    for row in range(2):
        for t in range(IDS.shape[1] - 1):
            label = LABELS[row, t + 1].item()
            if label == -100:
                continue
            p = torch.log(logits[row, t].double().exp() / logits[row, t].double().exp().sum())
            losses.append(-(1 - epsilon) * p[label] - epsilon * p.mean())
    return sum(losses) / len(losses)


@pytest.fixture
def warned(monkeypatch):
    """Messages of the warning about unknown supervision."""
    messages: list[str] = []
    monkeypatch.setattr(forward.logger, "warning_once", messages.append)
    return messages


@pytest.mark.parametrize("kind", [Trainer, SleepTrainer])
@pytest.mark.parametrize("epsilon", [1e-9, 0.1])
def test_label_smoothing_scores_the_next_token_from_the_right_windows(
    tmp_path, kind, epsilon, warned
):
    model = model_of()
    trainer = trainer_of(model.train(), tmp_path, kind, label_smoothing_factor=epsilon)
    given = {"input_ids": IDS, "labels": LABELS}
    if kind is Trainer:
        given = MarkSupervised(lambda features: dict(features))(given)
    loss = trainer.compute_loss(model, given)
    want = smoothed(model(IDS, labels=LABELS).logits, epsilon)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    assert not warned
    others = smoothed(model(IDS).logits, epsilon)
    assert abs(others - want) > 1e-3


@pytest.mark.parametrize("kind", [Trainer, SleepTrainer])
def test_a_loss_function_of_ones_own_sees_the_same_windows(tmp_path, kind, warned):
    seen = []

    def loss_function(outputs, labels, num_items_in_batch):
        seen.append(outputs.logits)
        return outputs.logits.sum()

    model = model_of().train()
    trainer = trainer_of(model, tmp_path, kind, loss_function)
    given = {"input_ids": IDS, "labels": LABELS}
    if kind is Trainer:
        given = MarkSupervised(lambda features: dict(features))(given)
    trainer.compute_loss(model, given)
    assert torch.equal(seen[0], model(IDS, labels=LABELS).logits)
    assert not warned


def test_supervised_and_labels_choose_the_same_windows_in_model_and_backbone():
    model = model_of()
    supervised = LABELS != -100
    want = model(IDS, labels=LABELS).logits
    assert torch.equal(model(IDS, supervised=supervised).logits, want)
    h = model.model(IDS, supervised=supervised).last_hidden_state
    assert torch.equal(model.lm_head(h), want)
    assert not torch.equal(model(IDS).logits, want)
    # Given both, `supervised` says which windows sleep, and labels what is scored.
    nothing = torch.zeros_like(supervised)
    assert torch.equal(model(IDS, labels=LABELS, supervised=nothing).logits, model(IDS).logits)


def test_under_every_window_nothing_that_is_supervised_stays_awake():
    model = model_of(sleep_schedule="every_window")
    want = model(IDS).logits
    assert torch.equal(model(IDS, supervised=LABELS != -100).logits, want)
    assert torch.equal(model(IDS, labels=LABELS).logits, want)
    assert torch.equal(model.model(IDS, supervised=LABELS != -100)[0], model.model(IDS)[0])


def test_a_training_step_that_cannot_know_what_is_supervised_warns(warned):
    model = model_of().train()
    model.model(IDS)
    assert len(warned) == 1
    for part in ("context_windows", "supervised=(labels != -100)", "MarkSupervised"):
        assert part in warned[0]


def test_nothing_warns_where_nothing_differs(warned):
    model = model_of().train()
    model(IDS, labels=LABELS)
    model(IDS, supervised=LABELS != -100)
    model(IDS, sleep_passes=1)
    model(IDS[:, :5])
    with torch.no_grad():
        model(IDS)
    model.eval()(IDS)
    model_of(sleep_schedule="every_window").train()(IDS)
    assert not warned


@pytest.mark.parametrize(
    "supervised", [torch.ones(2, 16, dtype=torch.bool), torch.ones(2, 17), torch.ones(17).bool()]
)
def test_what_is_no_mask_of_tokens_is_refused(supervised):
    model = model_of()
    for call in (model, model.model):
        with pytest.raises(ValueError, match=r"supervised must be bool of the input's shape, \(2"):
            call(IDS, supervised=supervised)


def test_a_collator_without_labels_is_refused():
    with pytest.raises(ValueError, match="needs a collator that makes `labels`, got a batch of"):
        MarkSupervised(lambda features: {"input_ids": IDS})([])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_sft_of_trl_learns_from_the_right_windows_with_its_default_settings(tmp_path, warned):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(11)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    data = datasets.Dataset.from_dict({"input_ids": IDS.tolist(), "labels": LABELS.tolist()})
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", bf16=False
    )
    losses = []
    for mark in (True, False):
        model = model_of()
        trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        if mark:
            trainer.data_collator = MarkSupervised(trainer.data_collator)
        losses.append(trainer.train().training_loss)
        assert model.is_activation_checkpointing
    want = model_of()(IDS, labels=LABELS).loss.item()
    assert losses[0] == pytest.approx(want, rel=1e-5)
    assert losses[1] != pytest.approx(want, rel=1e-3)
    assert warned
