"""FLOPs, parameters and bytes of a HybridSleepConfig, counted on paper: no model is made.

Counted, at 2 for each multiply-add: every matrix product (projections, MLPs, logits), attention
over the pairs of tokens that see each other (`q k` and `weights v`), and the recurrences of
state-space layers token by token: the gated delta rule reads with k, writes and reads with q,
Mamba-2 writes and reads with q; each touches all of `S: [H, K, V]`.

Not counted: embeddings, norms, rotary angles, softmax, activations, gates, decays, skip connections
and short convolutions: a few operations a channel, where a product takes `hidden_size` or more.
Kernels may compute more than this: attention the pairs that it masks, chunked recurrences some more
products in exchange for fewer steps.

All counts are of one row of a batch, without pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.validation import check_count

RECURRENCE = {"gated_deltanet": 3, "mamba2": 2}  # products with S a token; the last one reads


def visible_pairs(
    tokens: int, past: int = 0, *, reach: int | None = None, bidirectional: bool = False
) -> int:
    """How many (query, key) pairs `tokens` new tokens make behind `past` older ones.

    A query sees what lies before it and itself, at most `reach` of them (None: all), and with
    `bidirectional` the new tokens behind it as well.
    """
    total = past + tokens
    seen = tokens * total if bidirectional else tokens * past + tokens * (tokens + 1) // 2
    if reach is None:
        return seen
    return seen - _triangle(total - reach) + _triangle(past - reach)


def pass_flops(
    config: HybridSleepConfig,
    tokens: int,
    *,
    bidirectional: bool = False,
    past: int = 0,
    first: int = 0,
    last: int | None = None,
    write_only_last: bool = False,
) -> int:
    """Blocks `first`..`last` - 1 (None: up to the last) once over `tokens` new tokens.

    past: tokens before them whose keys and values are held; under sliding eviction a token sees
    the `window` last ones only. bidirectional: as attention in a sleep may be. write_only_last: the
    last block leaves its memory and nothing else, as in the last pass of a sleep.
    """
    check_count("tokens", tokens)
    check_count("past", past, minimum=0)
    layers = config.num_hidden_layers
    last = layers if last is None else last
    if not 0 <= check_count("first", first, minimum=0) < check_count("last", last) <= layers:
        raise ValueError(
            f"first, last must be 0 <= first < last <= {layers}, got {first}, {last}"
        )
    reach = config.window if config.eviction == "sliding" else None
    pairs = visible_pairs(tokens, past, reach=reach, bidirectional=bidirectional)
    flops = 0
    for layer in range(first, last):
        write_only = write_only_last and layer == last - 1
        flops += 2 * tokens * _products_per_token(config, layer, write_only)
        if config.layer_types[layer] == "full_attention" and not write_only:
            flops += 4 * pairs * config.num_attention_heads * config.head_dim
    return flops


def sleep_flops(config: HybridSleepConfig, tokens: int, passes: int, *, past: int = 0) -> int:
    """Passes 2..`passes` over a window of `tokens`, as `model.sleep` runs them; 0 for one pass.

    Looped blocks every pass, the coda behind the last one. The last pass ends where nothing later
    leaves anything at the boundary, and that block only writes. past: tokens from before the window
    that are still seen (sliding eviction).
    """
    check_count("tokens", tokens)
    check_count("passes", passes)
    start, end = config.loop_range
    writer = config.last_writer
    if passes == 1 or writer is None:
        return 0
    seen: dict[str, Any] = {
        "past": past,
        "bidirectional": config.sleep_attention == "bidirectional",
    }
    whole = pass_flops(config, tokens, first=start, last=end, **seen)
    if writer < end:
        until: dict[str, Any] = {"last": writer + 1, "write_only_last": True}
        return (passes - 2) * whole + pass_flops(config, tokens, first=start, **until, **seen)
    return (passes - 1) * whole + coda_flops(config, tokens, past=past)


def coda_flops(config: HybridSleepConfig, tokens: int, *, past: int = 0) -> int:
    """The coda behind the last pass over a window of `tokens`; 0 where no block behind writes."""
    (_, end), writer = config.loop_range, config.last_writer
    if writer is None or writer < end:
        return 0
    return pass_flops(
        config, tokens, first=end, last=writer + 1, write_only_last=True, past=past,
        bidirectional=config.sleep_attention == "bidirectional",
    )  # fmt: skip


def token_flops(config: HybridSleepConfig, past: int) -> int:
    """One decode step behind `past` tokens in the cache, its logits included.

    A model that sleeps has those of its open window there; one that keeps its whole KV cache, all.
    """
    return pass_flops(config, 1, past=past) + logit_flops(config)


def logit_flops(config: HybridSleepConfig, tokens: int = 1) -> int:
    """Logits of `tokens` tokens."""
    return 2 * tokens * config.hidden_size * config.vocab_size


def sequence_flops(
    config: HybridSleepConfig,
    tokens: int,
    passes: int,
    sleeps: int | None = None,
    *,
    logits: int | None = None,
) -> int:
    """A whole sequence of `tokens` tokens: pass 1 of every window, and the sleeps.

    sleeps: how many of the first windows sleep (0 or more, `passes` deep); the others only evict.
    None: all that are full when another token comes. logits: of how many tokens; None for all.
    """
    check_count("tokens", tokens)
    check_count("passes", passes)
    window = config.window
    full = (tokens - 1) // window
    sleeps = full if sleeps is None else min(full, check_count("sleeps", sleeps, minimum=0))
    logits = tokens if logits is None else check_count("logits", logits, minimum=0)
    flops = logit_flops(config, logits)
    for index in range(full + 1):
        length = window if index < full else tokens - full * window
        past = min(index * window, window - 1) if config.eviction == "sliding" else 0
        flops += pass_flops(config, length, past=past)
        if index < sleeps:
            flops += sleep_flops(config, length, passes, past=past)
    return flops


def shared_flops(config: HybridSleepConfig, depths: Sequence[int]) -> int:
    """What rows with the same first window, one slept on at each of `depths`, save together.

    Its passes run once, as often as the deepest needs; only the coda follows each (see
    `sleep.branches`). Forward alone.
    """
    window, shallower = config.window, sorted(depths)[:-1]
    codas = sum(passes > 1 for passes in shallower) * coda_flops(config, window)
    looped = sum(sleep_flops(config, window, passes) for passes in shallower) - codas
    return len(shallower) * pass_flops(config, window) + looped


def past_flops(config: HybridSleepConfig, tokens: int, passes: int) -> int:
    """A past of `tokens`, a multiple of the window: pass 1 and a sleep of every window.

    With the logits of one token, which a forward computes in any case.
    """
    window = config.window
    if check_count("tokens", tokens) % window:
        raise ValueError(f"tokens must be a multiple of the window, {window}, got {tokens}")
    before = min(tokens - window, window - 1) if config.eviction == "sliding" else 0
    read = sequence_flops(config, tokens, passes, logits=1)
    return read + sleep_flops(config, window, passes, past=before)


def training_flops(
    config: HybridSleepConfig,
    tokens: int,
    passes: int,
    sleeps: int | None = None,
    *,
    logits: int | None = None,
) -> int:
    """Forward and backward over one sequence: 3 times `sequence_flops`, a backward being twice it.

    torch computes more where activations are recomputed (up to one forward more, two with
    `("window", ...)`) and where logits are taken that no label needs, and less where no loss
    depends on a result: truncated passes and the coda of windows that only hold context.
    """
    return 3 * sequence_flops(config, tokens, passes, sleeps, logits=logits)


def parameters(config: HybridSleepConfig) -> int:
    """Parameters of a HybridSleepForCausalLM; layers and passes that share weights count once."""
    hidden, fields = config.hidden_size, config.token_fields
    count = hidden * (1 + (config.vocab_size if fields is None else sum(fields)))
    if not config.tie_word_embeddings:
        count += hidden * config.vocab_size
    distinct = getattr(config, "distinct_layers", None) or config.num_hidden_layers
    later = [*range(*config.loop_range)] * (config.distinct_passes - 1)
    for layer in (*range(distinct), *later):
        count += _weights(config, layer, False) + hidden * (1 + bool(config.mlp_widths[layer]))
        if config.layer_types[layer] == "full_attention":
            count += 2 * config.head_dim
            continue
        heads = config.linear_num_value_heads
        count += _channels(config) * config.linear_conv_kernel_dim
        count += 2 * heads + config.linear_value_head_dim
        count += heads * (config.state_space == "mamba2")
    return count


def kv_bytes(config: HybridSleepConfig, itemsize: int = 4) -> int:
    """Bytes of keys and values of one token, over all attention layers."""
    layers = sum(kind == "full_attention" for kind in config.layer_types)
    return 2 * itemsize * layers * config.num_key_value_heads * config.head_dim


def cache_bytes(
    config: HybridSleepConfig,
    tokens: int,
    *,
    past: int = 0,
    slept: bool = False,
    itemsize: int = 4,
) -> int:
    """What `SleepCache.nbytes()` says of one row with `tokens` in its open window.

    Fast weights (fp32), keys and values of the window and of `past` tokens before it (sliding
    eviction), pass-1 hidden states, convolution tails, and, once the row has `slept`, what the coda
    (and, under sliding eviction or where `sleep_carry` leaves out fast weights, every looped layer)
    started the window from. itemsize: bytes of an
    element of the model's dtype, at most 4. At `tokens` = 0 it is what stays behind a boundary.
    """
    check_count("tokens", tokens, minimum=0)
    sliding = config.eviction == "sliding"
    start, end = config.loop_range
    spaces = [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    heads, dim = config.linear_num_value_heads, config.linear_key_head_dim
    state = 4 * heads * dim * config.linear_value_head_dim
    tail = itemsize * (config.linear_conv_kernel_dim - 1) * _channels(config)
    size = len(spaces) * (state + tail * bool(tokens or sliding))
    size += (tokens + past) * kv_bytes(config, itemsize)
    size += itemsize * tokens * config.hidden_size
    if slept:
        opened = start if config.sleep_carry == "hidden_states" else end
        size += state * sum(i >= opened for i in spaces)
        size += tail * sum(i >= start for i in spaces) * sliding
    return size


def _products_per_token(config: HybridSleepConfig, layer: int, write_only: bool) -> int:
    """Multiply-adds of a block for each token, attention's pairs apart."""
    count = _weights(config, layer, write_only)
    if config.layer_types[layer] == "full_attention":
        return count
    touched = RECURRENCE[config.state_space] - write_only
    heads, dim = config.linear_num_value_heads, config.linear_key_head_dim
    return count + touched * heads * dim * config.linear_value_head_dim


def _weights(config: HybridSleepConfig, layer: int, write_only: bool) -> int:
    """Elements of the matrices of a block that a token is multiplied with."""
    hidden = config.hidden_size
    mlp = 0 if write_only else 3 * config.mlp_widths[layer]
    if config.layer_types[layer] == "full_attention":
        keys = 2 * config.num_key_value_heads * config.head_dim
        read = 0 if write_only else 2 * config.num_attention_heads * config.head_dim
        return hidden * (keys + read + mlp)
    heads = config.linear_num_value_heads
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = heads * config.linear_value_head_dim
    gates = heads * (2 if config.state_space == "gated_deltanet" else 1)
    written = keys + values + gates
    # Under sliding eviction queries are computed for their convolution's tail, even if unread.
    queries = keys * (not write_only or config.eviction == "sliding")
    read = 0 if write_only else 2 * values
    return hidden * (written + queries + read + mlp)


def _channels(config: HybridSleepConfig) -> int:
    """Channels of q, k and v in a state-space layer, which are what it convolves."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return 2 * keys + config.linear_num_value_heads * config.linear_value_head_dim


def _triangle(n: int) -> int:
    """1 + 2 + ... + n, 0 for n < 1."""
    return n * (n + 1) // 2 if n > 0 else 0
