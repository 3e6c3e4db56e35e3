"""What every test shares: no network, a fixed seed, GPU tests that say why they are skipped."""

from __future__ import annotations

import os

# Read when transformers and matplotlib are first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

# A gate gives the same verdict twice; `pytest --hypothesis-profile=explore` looks for new cases.
settings.register_profile("gate", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("gate")

# Read when a kernel is decorated: without a GPU Triton's interpreter runs them all.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _runs_are_drawn_once():
    """A run's figure takes longer than a short run: one with the same labels is not drawn again."""
    from hybrid_sleep.training import plots

    drawn, save = {}, plots.save_figure

    def once(figure, path):
        labels = [axes.get_title(side) for axes in figure.axes for side in ("left", "center")]
        labels += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        if tuple(labels) not in drawn:
            save(figure, path)
            drawn[tuple(labels)] = path.read_bytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn[tuple(labels)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_figure", once)
        yield


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))
