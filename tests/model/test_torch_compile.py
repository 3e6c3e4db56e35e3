"""torch.compile: the model runs as it is, its blocks compile, and nothing is compiled twice."""

from __future__ import annotations

import pytest
import torch
from small import small_ids, small_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments

SHAPES = [(2, 12), (3, 9), (1, 1)]
AGAIN_FAILS = torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture
def backend():
    """Counts the graphs that are compiled, and runs them eagerly."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def test_a_compiled_model_gives_the_same_bits_and_compiles_nothing_again(backend):
    plain, model = small_model(sleep_passes=2), small_model(sleep_passes=2)
    compiled = torch.compile(model, backend=backend)
    for shape in SHAPES:
        ids = small_ids(*shape)
        assert torch.equal(compiled(ids).logits, plain(ids).logits)
    ids = small_ids(2, 12)
    compiled(ids, labels=ids).loss.backward()
    plain(ids, labels=ids).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with AGAIN_FAILS:
        for shape in SHAPES:
            compiled(small_ids(*shape))
        compiled(ids, labels=ids).loss.backward()
    backbone = torch.compile(model.model, backend=backend)
    assert torch.equal(backbone(ids)[0], model.model(ids)[0])
    assert backend.frame_count == 0


def test_trainer_compiles_and_trains_alike(tmp_path):
    ids, weights = small_ids(12), []
    for backend in (None, "eager"):
        model = small_model(dtype=torch.float32, sleep_passes=2)
        arguments = TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            max_steps=2,
            save_strategy="no",
            disable_tqdm=True,
            torch_compile_backend=backend,
        )
        data = [{"input_ids": ids, "labels": ids}] * 16
        Trainer(model, arguments, train_dataset=data).train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_blocks_compile_whole_and_once(backend):
    kinds = ["full_attention", "linear_attention"]
    plain, model = small_model(layer_types=kinds), small_model(layer_types=kinds)
    for block in model.model.layers:
        block.compile(backend=backend, fullgraph=True)
    ids = small_ids(2, 5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        with AGAIN_FAILS:
            assert torch.equal(model(ids).logits, plain(ids).logits)
    assert backend.frame_count == 2


def test_a_graph_without_breaks_is_refused_with_the_reason():
    torch._dynamo.reset()
    compiled = torch.compile(small_model(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compile the blocks, which is where the time goes"):
        compiled(small_ids(1, 3))
