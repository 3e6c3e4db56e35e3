"""When to sleep: what asks for a sleep, and what it has to wait for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, time, timedelta
from typing import Any

from hybrid_sleep.parametric.pressure import Pressure
from hybrid_sleep.validation import check_count, check_number


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a memory is to sleep: something asks for it, and nothing stands against it.

    pressure, tokens: either asks for a sleep: the pressure (see `pressure.py`; 1 is at a limit),
        or tokens of experience that wait. None: that one never does.
    idle: hours that nobody has used the memory for. window: two times of day, "22:00" and "06:00"
        say, between which it may sleep; None: at any.
    rest: hours between two sleeps at least, whatever came of the first: what a gate refuses is
        refused again if nothing has changed. overdue: hours since then from which the window is
        waited for no longer, so that a machine that is off at night sleeps as well; None: never.

    Raises ValueError for what is out of range, and where nothing could ask for a sleep.
    """

    pressure: float | None = 1.0
    tokens: int | None = 4096
    idle: float = 0.5
    window: tuple[str, str] | None = None
    rest: float = 6.0
    overdue: float | None = 48.0

    def __post_init__(self) -> None:
        if self.pressure is None and self.tokens is None:
            raise ValueError("pressure or tokens must ask for a sleep, got None for both")
        if self.pressure is not None:
            check_number("pressure", self.pressure, above=0)
        if self.tokens is not None:
            check_count("tokens", self.tokens)
        check_number("idle", self.idle, least=0)
        check_number("rest", self.rest, least=0)
        if self.overdue is not None:
            check_number("overdue", self.overdue, above=0)
        if self.window is not None:
            times = {_time_of_day(text) for text in self.window}
            if len(self.window) != 2 or len(times) != 2:
                raise ValueError(f"window must be two different times of day, got {self.window!r}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schedule:
        """The schedule of `dataclasses.asdict`, as JSON and YAML give it back."""
        window = data.get("window")
        return cls(**{**data, "window": None if window is None else tuple(window)})

    def within(self, now: datetime) -> bool:
        """Whether the clock of `now` is in the window: from its start on, before its end."""
        if self.window is None:
            return True
        start, end = map(_time_of_day, self.window)
        clock = now.time()
        return start <= clock < end if start < end else clock >= start or clock < end


@dataclass(frozen=True)
class Due:
    """Whether to sleep now, and why, or why not; as a truth value the first."""

    sleep: bool
    why: str

    def __bool__(self) -> bool:
        return self.sleep

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def due(
    now: datetime,
    schedule: Schedule,
    pressure: Pressure,
    *,
    waiting: int,
    tokens: int = 0,
    active: datetime | None = None,
    tried: datetime | None = None,
    since: datetime | None = None,
) -> Due:
    """Whether `schedule` asks for a sleep at `now`, whose time zone is that of the window.

    waiting: how many things a sleep would be over; none: it would have nothing to do. tokens: of
    experience among them. active: when the memory was used last, tried: when the last sleep began
    or ended, since: when what waits began to, where no sleep was tried. None: never. All times have
    a zone; one that is still to come says that a clock was wrong, and counts for none.
    """
    if not waiting:
        return Due(False, "nothing is new since the last sleep")
    last = _ago(now, tried)
    if last is not None and last < timedelta(hours=schedule.rest):
        return Due(
            False, f"the last sleep was {_said(last)} ago, and {schedule.rest:g} h lie between two"
        )
    used = _ago(now, active)
    if used is not None and used < timedelta(hours=schedule.idle):
        return Due(
            False, f"it was used {_said(used)} ago, and is idle only after {schedule.idle:g} h"
        )
    if schedule.pressure is not None and pressure.value >= schedule.pressure:
        why = f"the pressure is {pressure.value:.2f}, of {pressure.driver}"
    elif schedule.tokens is not None and tokens >= schedule.tokens:
        why = f"{tokens} tokens of experience wait"
    else:
        asks = []
        if schedule.pressure is not None:
            asks.append(f"a pressure of {pressure.value:.2f} of {schedule.pressure:g}")
        if schedule.tokens is not None:
            asks.append(f"{tokens} waiting tokens of {schedule.tokens}")
        return Due(False, f"nothing asks for it yet: {' and '.join(asks)}")
    if schedule.within(now):
        return Due(True, why)
    assert schedule.window is not None
    start, end = schedule.window
    awake = last if last is not None else _ago(now, since)
    if (
        awake is not None
        and schedule.overdue is not None
        and awake >= timedelta(hours=schedule.overdue)
    ):
        return Due(True, f"{why}, and it is overdue after {_said(awake)}, outside {start} to {end}")
    return Due(False, f"{why}, but {now:%H:%M} is outside {start} to {end}")


def _time_of_day(text: Any) -> time:
    try:
        return datetime.strptime(text, "%H:%M").time()
    except (TypeError, ValueError):
        raise ValueError(f"window must be times of day such as '22:00', got {text!r}") from None


def _ago(now: datetime, then: datetime | None) -> timedelta | None:
    return None if then is None or then > now else now - then


def _said(ago: timedelta) -> str:
    minutes = int(ago.total_seconds() // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
