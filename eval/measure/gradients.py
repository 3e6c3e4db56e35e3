"""How the gradient of the loss reaches the passes of a sleep: does depth make it vanish or grow?"""

from __future__ import annotations

from typing import Any

import torch

from hybrid_sleep.eval.measure.run_cost import first_label, sleeping_windows
from hybrid_sleep.eval.tasks import Task
from hybrid_sleep.training.data import TRAIN_SPLIT
from hybrid_sleep.validation import check_count


def gradient_norms(
    model: Any, task: Task, passes: int, count: int = 32, seed: int = 0
) -> list[float]:
    """Norm of the gradient at the hidden states that go into each pass, pass 1 first.

    Of the mean loss of `count` training examples of `task` that slept `passes` times; over the
    tokens of their first window and the hidden size, and all examples. What goes into pass n
    reaches the loss through passes n to N. The model is in eval mode meanwhile, and left as it was
    found, gradients of its own included.

    Raises ValueError for a count or depth below 1, and where the first window does not sleep.
    """
    check_count("passes", passes)
    check_count("count", count)
    if task.length <= model.config.window or sleeping_windows(task, model.config) == 0:
        raise ValueError(
            f"task must have a first window that sleeps, got examples of {task.length} tokens, "
            f"labels from token {first_label(task)} on and a window of {model.config.window}"
        )
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in task.batch(TRAIN_SPLIT, seed, count).items()}
    entering: list[torch.Tensor] = []

    def watch(block: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        # A copy of its own, as passes that do not carry hidden states all read the same ones.
        h = arguments[0] * 1
        entering.append(h if h.requires_grad else h.requires_grad_())
        return (h, *arguments[1:])

    options, blocks = model.model.options, model.model.blocks
    (first, end), own = options.loop, options.distinct_passes
    starts = [options.looped_blocks(n + 1, len(blocks)).start for n in range(own)]
    hooks = [blocks[start].register_forward_pre_hook(watch) for start in starts]
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            loss = model(**batch, sleep_passes=passes, use_cache=False).loss
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    # Where layers are shared a block runs several times in a pass.
    alike = [i for i, block in enumerate(blocks) if block is blocks[first]]
    again = 1 if own > 1 else sum(first <= i < end for i in alike)
    places = [alike.index(first), *(len(alike) + again * n for n in range(passes - 1))]
    found = torch.autograd.grad(loss, [entering[place] for place in places], allow_unused=True)
    return [0.0 if gradient is None else float(gradient.double().norm()) for gradient in found]
