"""HybridSleepConfig: what a sleeping hybrid is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeVar

from transformers import PreTrainedConfig

from hybrid_sleep.sleep.options import (
    Passes,
    SleepOptions,
    check_loop,
    check_passes,
    check_sleep,
    last_writer,
)
from hybrid_sleep.validation import check_choice, check_count, check_flag, check_number, check_rope

LAYER_TYPES = ("full_attention", "linear_attention")
STATE_SPACES = ("gated_deltanet", "mamba2")
# A cache means the same under any value of these.
_FREE_FIELDS = (
    "sleep_passes",
    "sleep_schedule",
    "use_cache",
    "initializer_range",
    "embedding_initializer_range",
    "time_step_min",
    "time_step_max",
    "attention_dropout",
    "max_position_embeddings",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "weights_version",
)

T = TypeVar("T")
UNSET: Any = None
if TYPE_CHECKING:
    # Where None was given, the config fills in a value: whoever reads such a field finds one.
    Filled = Annotated[T, "None when given"]
else:
    Filled = Optional


class HybridSleepConfig(PreTrainedConfig):
    """Configuration of a causal hybrid that sleeps. Names are transformers' where it has one.

    Backbone:
        layer_types: one of `full_attention`, `linear_attention` per layer. Default: alternating,
            attention first.
        state_space: what a `linear_attention` layer is: `gated_deltanet` (Gated Delta Networks,
            arXiv 2412.06464) or `mamba2` (SSD, arXiv 2405.21060).
        linear_num_key_heads, linear_num_value_heads: key heads must divide value heads. For
            `mamba2` the key heads are its groups and the key dim its state size.
        linear_key_head_dim, linear_value_head_dim: K and V of the fast weights `S: [B, H, K, V]`.
        linear_conv_kernel_dim: width W of the short convolution, at least 2.
        linear_allow_neg_eigval: let beta of `gated_deltanet` lie in (0, 2) instead of (0, 1), so
            that a token may turn the sign of what is stored (Grazzi et al., arXiv 2411.12537);
            with 1 - beta above 0 alone one layer cannot track parity. `mamba2` has no such factor.
        intermediate_size: width of the SwiGLU MLP behind each mixer, or a list with one for each
            layer; 0 leaves the MLP out.
        distinct_layers: how many layers have weights of their own; layer i is applied with those of
            layer i % distinct_layers, and a state of its own. A divisor of `num_hidden_layers`,
            after which `layer_types` and widths repeat. None: all. Half as many make a model that
            loops twice over its layers for every token, in decoding as in a sleep.
        token_fields: None, and every token has an embedding of its own; or a list of at least two
            integers of at least 1 with the product vocab_size (compound tokens, cf. Hsiao et al.,
            arXiv 2101.02402). An id is then a number of that mixed radix, the last digit running
            fastest, `(d1 * f2 + d2) * f3 + d3` of [f1, f2, f3], and its embedding the sum of one
            vector for each digit. Whole ids are predicted, so embeddings cannot be tied.

    Sleep (Lee et al., arXiv 2605.26099, Algorithm 1):
        window: L, tokens that attention sees at a time, at least 1.
        sleep_passes: default depth N, at least 1; pass 1 is the ordinary forward. A call may
            choose another depth.
        loop: `(start, end)`, blocks that are repeated; None means all. Blocks before run once,
            blocks after run on the last pass.
        eviction: `hard` keeps only fast weights across a boundary; `sliding` also keeps the last
            L - 1 tokens' keys and values, and the convolution tails.
        sleep_schedule: with labels, `context_windows` lets only windows without a supervised token
            sleep; `every_window` lets every full window sleep after it has predicted.
        sleep_attention: attention in passes 2..N, `causal` or `bidirectional` within the window.
        sleep_carry: what a pass takes over from the one before, `both` (hidden states and fast
            weights), `hidden_states` or `fast_weights`; see `SleepOptions`.
        distinct_passes: how many passes have weights of their own, at least 1: pass j those of
            number min(j, distinct_passes), for the layers in the loop. At 1 all have those that
            predict, and there are no more parameters than without a sleep.

    Numbers:
        rms_norm_eps: above 0. attention_dropout: in [0, 1).
        initializer_range: standard deviation of new weights, of at least 0; what layers pass on
            shrinks where it is far below `hidden_size ** -0.5`, as the default is for a small one.
        embedding_initializer_range: that of token embeddings, or of each digit's vector; None: the
            same. At 1 they outweigh what the layers add at first; logits too, where the two are
            tied.
        time_step_min, time_step_max: above 0; the time steps of new state-space layers are drawn
            log-uniformly between them. A head starts with a decay of `exp(-A step)` a token, A of 1
            to 16: by default a window of 24 tokens leaves between 0.98 and 0.00 of what it found,
            and a sleep reads it N times. Smaller steps keep it until training says otherwise.
        rope_parameters: `rope_type` (`default`, `linear`, `proportional`, `llama3`, `yarn`), its
            `rope_theta` and the keys that this type needs. None: `default` with 10000.
        pad_token_id, bos_token_id, eos_token_id: None or in the vocabulary; of eos also several.

    Raises ValueError naming the argument, its value and what is allowed.
    """

    model_type = "hybrid_sleep"
    keys_to_ignore_at_inference = ["cache"]

    vocab_size: int = 32000
    token_fields: list[int] | None = None
    hidden_size: int = 512
    intermediate_size: int | list[int] = 1408
    num_hidden_layers: int = 8
    layer_types: Filled[list[str]] = UNSET
    distinct_layers: int | None = None
    num_attention_heads: int = 8
    num_key_value_heads: Filled[int] = UNSET
    head_dim: Filled[int] = UNSET
    max_position_embeddings: int = 1_048_576
    rope_parameters: Filled[dict[str, Any]] = UNSET
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    embedding_initializer_range: Filled[float] = UNSET
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    state_space: Literal["gated_deltanet", "mamba2"] = "gated_deltanet"
    linear_num_key_heads: int = 4
    linear_num_value_heads: int = 4
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    linear_allow_neg_eigval: bool = False

    window: int = 1024
    sleep_passes: int = 1
    loop: tuple[int, int] | None = None
    eviction: Literal["hard", "sliding"] = "hard"
    sleep_schedule: Literal["context_windows", "every_window"] = "context_windows"
    sleep_attention: Literal["causal", "bidirectional"] = "causal"
    sleep_carry: Literal["both", "hidden_states", "fast_weights"] = "both"
    distinct_passes: int = 1
    weights_version: int = 0

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing. Loading with trust_remote_code calls it, and then saving would copy this
        module without its package and overwrite auto_map."""

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
            check_count(name, getattr(self, name))
        if self.layer_types is None:
            self.layer_types = [LAYER_TYPES[i % 2] for i in range(self.num_hidden_layers)]
        elif isinstance(self.layer_types, tuple):
            self.layer_types = list(self.layer_types)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if isinstance(self.loop, list):
            self.loop = tuple(self.loop)
        if isinstance(self.token_fields, tuple):
            self.token_fields = list(self.token_fields)
        self._take_rope(kwargs)
        self._check_backbone()
        self._check_numbers()
        self._check_tokens()
        self._check_token_fields()
        self._check_sleep()
        super().__post_init__(**kwargs)

    def _take_rope(self, kwargs: dict[str, Any]) -> None:
        """Make `rope_parameters` whole and its own, from it and from the names that it once had."""
        rope = kwargs.pop("rope_scaling", None) or self.rope_parameters
        rope = {} if rope is None else rope
        if isinstance(rope, Mapping):
            rope = {"rope_type": rope.get("type", "default"), **rope}
            rope.setdefault("rope_theta", kwargs.pop("rope_theta", 10000.0))
        check_rope(rope)
        self.rope_parameters = rope

    def _check_backbone(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "max_position_embeddings",
        ):
            check_count(name, getattr(self, name))
        self._check_mlps()
        check_count("linear_conv_kernel_dim", self.linear_conv_kernel_dim, minimum=2)
        check_count("weights_version", self.weights_version, minimum=0)
        check_choice("state_space", self.state_space, STATE_SPACES)
        check_flag("linear_allow_neg_eigval", self.linear_allow_neg_eigval)
        if self.linear_allow_neg_eigval and self.state_space != "gated_deltanet":
            raise ValueError(
                "linear_allow_neg_eigval must be False unless state_space is 'gated_deltanet', "
                f"got True with {self.state_space!r}"
            )
        kinds = self.layer_types
        if not isinstance(kinds, list) or len(kinds) != self.num_hidden_layers:
            got = f"{len(kinds)} entries" if isinstance(kinds, list) else repr(kinds)
            raise ValueError(
                f"layer_types must be a list of one each for num_hidden_layers="
                f"{self.num_hidden_layers}, got {got}"
            )
        for i, layer_type in enumerate(self.layer_types):
            check_choice(f"layer_types[{i}]", layer_type, LAYER_TYPES)
        self._check_distinct_layers()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads="
                f"{self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"linear_num_key_heads must divide linear_num_value_heads="
                f"{self.linear_num_value_heads}, got {self.linear_num_key_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even for rotary embeddings, got {self.head_dim} "
                "(default: hidden_size // num_attention_heads)"
            )

    def _check_numbers(self) -> None:
        check_number("rms_norm_eps", self.rms_norm_eps, above=0)
        check_number("initializer_range", self.initializer_range, least=0)
        if self.embedding_initializer_range is None:
            self.embedding_initializer_range = self.initializer_range
        check_number("embedding_initializer_range", self.embedding_initializer_range, least=0)
        check_number("time_step_min", self.time_step_min, above=0)
        check_number("time_step_max", self.time_step_max, least=self.time_step_min)
        check_number("attention_dropout", self.attention_dropout, least=0, below=1)
        check_flag("tie_word_embeddings", self.tie_word_embeddings)
        check_flag("use_cache", self.use_cache)
        if isinstance(self.dtype, str):
            import torch

            if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
                raise ValueError(
                    f"dtype must be None or a dtype of torch such as 'bfloat16', got {self.dtype!r}"
                )

    def _check_tokens(self) -> None:
        last = self.vocab_size - 1
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, (list, tuple)) and value
            for token in value if several else (value,):
                number = isinstance(token, int) and not isinstance(token, bool)
                if not (number and 0 <= token <= last) and not (token is None and not several):
                    lists = ", or a list of such" if name == "eos_token_id" else ""
                    raise ValueError(f"{name} must be None or in 0..{last}{lists}, got {value!r}")

    def _check_token_fields(self) -> None:
        fields = self.token_fields
        if fields is None:
            return
        if not isinstance(fields, list) or len(fields) < 2:
            raise ValueError(
                f"token_fields must be None or a list of at least two integers, got {fields!r}"
            )
        for i, size in enumerate(fields):
            check_count(f"token_fields[{i}]", size)
        if math.prod(fields) != self.vocab_size:
            raise ValueError(
                f"token_fields must have the product vocab_size={self.vocab_size}, got {fields}, "
                f"whose product is {math.prod(fields)}"
            )
        if self.tie_word_embeddings:
            raise ValueError(
                f"token_fields must be None where tie_word_embeddings is True, got {fields}: there "
                "is no embedding of a whole token to predict with"
            )

    def _check_mlps(self) -> None:
        widths = self.intermediate_size
        if not isinstance(widths, list):
            check_count("intermediate_size", widths, minimum=0)
            return
        if len(widths) != self.num_hidden_layers:
            raise ValueError(
                f"intermediate_size must be an integer, or a list of one each for "
                f"num_hidden_layers={self.num_hidden_layers}, got {len(widths)} entries"
            )
        for i, width in enumerate(widths):
            check_count(f"intermediate_size[{i}]", width, minimum=0)

    def _check_distinct_layers(self) -> None:
        count, layers = self.distinct_layers, self.num_hidden_layers
        if count is None:
            return
        if layers % check_count("distinct_layers", count):
            raise ValueError(
                f"distinct_layers must be None or divide num_hidden_layers={layers}, got {count}"
            )
        repeating: dict[str, Sequence[Any]] = {
            "layer_types": self.layer_types,
            "intermediate_size": self.mlp_widths,
        }
        for name, values in repeating.items():
            if any(values[i] != values[i % count] for i in range(layers)):
                raise ValueError(
                    f"{name} must repeat after distinct_layers={count} layers, got {values}"
                )

    def _check_sleep(self) -> None:
        check_sleep(
            self.window,
            self.sleep_passes,
            self.eviction,
            self.sleep_schedule,
            self.sleep_attention,
            self.sleep_carry,
            self.distinct_passes,
            prefix="sleep_",
        )
        if self.loop is not None:
            check_loop(self.loop, self.num_hidden_layers)

    @property
    def sleep_options(self) -> SleepOptions:
        """When and how a model of this config sleeps."""
        # Asked for many times a token, and configs of transformers look twice at every attribute.
        held = vars(self)
        return _options(
            held["window"],
            self.loop_range,
            held["sleep_passes"],
            held["eviction"],
            held["sleep_schedule"],
            held["sleep_attention"],
            held["sleep_carry"],
            held["distinct_passes"],
        )

    @property
    def fast_weight_layers(self) -> list[int]:
        """Indices of the state-space layers."""
        return [i for i, kind in enumerate(self.layer_types) if kind == "linear_attention"]

    @property
    def last_writer(self) -> int | None:
        """The last block that matters to a sleep, see `sleep.options.last_writer`."""
        attention = [i for i, kind in enumerate(self.layer_types) if kind == "full_attention"]
        return last_writer(self.sleep_options, self.fast_weight_layers, attention)

    def check_passes(self, passes: Any, name: str = "passes") -> Passes:
        """Return `passes` if a sleep of this config can be that deep, else raise ValueError."""
        return check_passes(passes, self.loop_range, self.fast_weight_layers, name)

    def architecture(self) -> dict[str, Any]:
        """The fields that give a cache its meaning, as plain JSON data."""
        own = {name for name in HybridSleepConfig.__annotations__ if name not in _FREE_FIELDS}
        return json.loads(json.dumps({name: getattr(self, name) for name in sorted(own)}))

    @property
    def loop_range(self) -> tuple[int, int]:
        """`(start, end)` of the blocks that a sleep repeats."""
        held = vars(self)
        start, end = (0, held["num_hidden_layers"]) if held["loop"] is None else held["loop"]
        return start, end

    @property
    def mlp_widths(self) -> list[int]:
        """Width of each layer's MLP, 0 where there is none."""
        widths = self.intermediate_size
        return widths if isinstance(widths, list) else [widths] * self.num_hidden_layers

    @property
    def fast_weight_bytes(self) -> int:
        """Bytes of fast weights of one row (fp32), over all state-space layers."""
        one = self.linear_num_value_heads * self.linear_key_head_dim * self.linear_value_head_dim
        return 4 * one * sum(kind == "linear_attention" for kind in self.layer_types)

    @property
    def attention_scale(self) -> float:
        """Scale of attention logits, `head_dim ** -0.5`."""
        return 1.0 / math.sqrt(self.head_dim)


@lru_cache(maxsize=64)
def _options(*fields: Any) -> SleepOptions:
    """One object for equal fields: options are asked for in every forward pass."""
    return SleepOptions(*fields)
