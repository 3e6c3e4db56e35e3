"""One dialect of errors: what a value must be, and what it was instead."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

# What torch can hold as an integer; a larger one would overflow deep inside an operation.
LARGEST = 2**63 - 1
LARGEST_FLOAT = sys.float_info.max

_ROPE_KEYS = {
    # rope_type: keys that it needs, keys that it may have besides
    "default": ((), ()),
    "linear": (("factor",), ()),
    "proportional": ((), ("factor", "partial_rotary_factor")),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError naming `name` unless `value` is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_count(name: str, value: Any, minimum: int = 1, maximum: int = LARGEST) -> int:
    """Return `value` if it is an integer of `minimum`..`maximum`, else raise ValueError naming it.

    The message leaves out the upper bound where it is what torch can hold and `value` keeps it.
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not (is_integer and minimum <= value <= maximum):
        bounds = f"of at least {minimum}"
        if maximum < LARGEST:
            bounds += f" and at most {maximum}"
        elif is_integer and value > maximum:
            bounds = "of at most 2**63 - 1"
        raise ValueError(f"{name} must be an integer {bounds}, got {value!r}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """Return `value` if it is True or False, else raise ValueError naming it."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def check_number(
    name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf,
    below: float = math.inf,
) -> float:  # fmt: skip
    """Return `value` if it is a finite number > `above`, >= `least` and < `below`, else raise.

    The ValueError names it and the bounds that are given.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and above < value < below and value >= least and abs(value) <= LARGEST_FLOAT):
        bounds = {"above": above, "of at least": least, "below": below}
        given = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
        text = " ".join(["a finite number", " and ".join(given)]).strip()
        raise ValueError(f"{name} must be {text}, got {value!r}")
    return value


def check_rope(rope: Any) -> None:
    """Raise ValueError unless `rope` is a full and possible `rope_parameters`.

    Its `rope_type` decides which keys there must be and may be besides. An optional key that is
    None counts as left out.
    """
    if not isinstance(rope, Mapping):
        raise ValueError(
            "rope_parameters must be None or a dict such as {'rope_type': 'default', "
            f"'rope_theta': 10000.0}}, got {rope!r}"
        )
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            "rope_parameters['rope_type'] must not depend on the length so far, which "
            f"a sleeping model does not keep; got {kind!r}, use 'default', 'linear', "
            "'llama3' or 'yarn'"
        )
    check_choice("rope_parameters['rope_type']", kind, tuple(_ROPE_KEYS))
    needed, optional = _ROPE_KEYS[kind]
    known = ("rope_type", "rope_theta", *needed, *optional)
    for key in rope:
        # Older configs say `type` as well, and 1.0 is what every head has here.
        harmless = key == "type" or (key == "partial_rotary_factor" and rope[key] in (1, None))
        if key not in known and not harmless:
            raise ValueError(
                f"rope_parameters of rope_type {kind!r} must have keys out of {', '.join(known)}, "
                f"got {key!r}"
            )
    for key in needed:
        if rope.get(key) is None:
            raise ValueError(
                f"rope_parameters of rope_type {kind!r} must have {key!r}, got {rope!r}"
            )
    for key, value in rope.items():
        name = f"rope_parameters[{key!r}]"
        if key in ("rope_type", "type") or (value is None and key not in needed):
            continue
        if key == "truncate":
            check_flag(name, value)
        elif key == "original_max_position_embeddings":
            check_count(name, value)
        elif key == "factor":
            check_number(name, value, least=1)
        elif key == "partial_rotary_factor":
            check_number(name, value, above=0, least=0)
        else:
            # The logarithm of the base is divided by.
            check_number(name, value, above=1 if (kind, key) == ("yarn", "rope_theta") else 0)
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if rope.get(low) and rope.get(high) and rope[low] >= rope[high]:
            raise ValueError(
                f"rope_parameters[{high!r}] must be above {low}={rope[low]!r}, got {rope[high]!r}"
            )
