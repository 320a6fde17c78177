"""Guards of a machine that is always on: the load of other programs, and the heat of a Raspberry Pi."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from lfm2vl_edge.config import is_finite, require
from lfm2vl_edge.errors import shorten
from lfm2vl_edge.planning.budget import DETAILS, Detail, ImageBudget

PI_TEMPERATURE: Final = 80.0
"""Degrees Celsius at which a Raspberry Pi 4 lowers its clock; a Pi 5 does at 85."""
_MARGIN: Final = 5.0
"""Detail is lowered so many degrees below the limit."""
_COOL: Final = 15.0
"""Detail is raised again so many degrees below the limit, ..."""
_COOL_SECONDS: Final = 120.0
"""... after so long without a reason to lower it."""
_STEP_SECONDS: Final = 20.0
"""Least time between two steps down: the temperature follows the work slowly."""
_THROTTLED: Final = 0b1110
"""Bits of the firmware's report: the clock is capped, throttled, at the soft limit of the temperature, now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensors:
    """Files of Linux, and the load.

    Attributes:
        thermal: the folder of the temperatures.
        throttled: what `vcgencmd get_throttled` reports, of the firmware of a Raspberry Pi.
        load: returns the average number of threads that were running or waiting for a processor in the last minute.
        clock: seconds.
    """

    thermal: Path = Path("/sys/class/thermal")
    throttled: Path = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
    load: Callable[[], float] = lambda: os.getloadavg()[0]
    clock: Callable[[], float] = time.monotonic

    @property
    def is_pi(self) -> bool:
        """Whether there is the firmware of a Raspberry Pi."""
        return self.throttled.exists()

    def temperature(self) -> float | None:
        """Return the highest temperature, degrees Celsius; None if none can be read."""
        found = []
        for path in self.thermal.glob("thermal_zone*/temp"):
            try:
                found.append(int(path.read_text()) / 1000)
            except (OSError, ValueError):
                continue
        return max(found, default=None)

    def is_throttled(self) -> bool:
        """Return whether the firmware slows the processor down now."""
        try:
            return bool(int(self.throttled.read_text(), 16) & _THROTTLED)
        except (OSError, ValueError):
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """What a machine may be asked to do.

    Attributes:
        max_load: no question is asked while the load is above it; None: no limit.
        max_temperature: degrees Celsius that shall not be reached; None: `PI_TEMPERATURE` on a Raspberry Pi, else no
            limit.

    Raises:
        ConfigError: a number is out of range.
    """

    max_load: float | None = None
    max_temperature: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_load", "max_temperature"):
            value = getattr(self, name)
            is_valid = value is None or (is_finite(value) and value > 0)
            require(is_valid, f"{name} is {shorten(value)}; it must be a number above 0")


class Guard:
    """Decides whether a question may be asked now, and in which detail."""

    def __init__(self, settings: GuardSettings, budget: ImageBudget, sensors: Sensors | None = None) -> None:
        self._settings, self._budget, self._sensors = settings, budget, sensors or Sensors()
        self._limit = settings.max_temperature
        if self._limit is None and self._sensors.is_pi:
            self._limit = PI_TEMPERATURE
        self._levels: tuple[Detail, ...] = DETAILS[: DETAILS.index(budget.detail) + 1][::-1]
        self._level = 0
        self._stepped = self._warm = -_COOL_SECONDS
        self._temperature: float | None = None
        self.note: str | None = None
        """What the last call of `update` changed, for people; None if nothing."""

    @property
    def budget(self) -> ImageBudget:
        """What an image may take now."""
        return replace(self._budget, detail=self._levels[self._level])

    def update(self) -> str | None:
        """Read the sensors, and return why no question may be asked now; None if one may."""
        self.note = None
        load = self._sensors.load() if self._settings.max_load is not None else 0.0
        if self._settings.max_load is not None and load > self._settings.max_load:
            return f"the load is {load:.1f}, above {self._settings.max_load:g}"
        if self._limit is None:
            return None
        self._temperature = self._sensors.temperature()
        is_hot = self._sensors.is_throttled() or (self._temperature or 0.0) >= self._limit - _MARGIN
        now = self._sensors.clock()
        if is_hot or (self._temperature or 0.0) > self._limit - _COOL:
            self._warm = now
        if is_hot and now - self._stepped >= _STEP_SECONDS and self._level < len(self._levels) - 1:
            self._step(1, now)
        elif now - self._warm >= _COOL_SECONDS and now - self._stepped >= _COOL_SECONDS and self._level > 0:
            self._step(-1, now)
        at_least = self._level == len(self._levels) - 1
        if at_least and is_hot and (self._temperature or 0.0) >= self._limit:
            return f"the temperature is {self._temperature:.0f} C, at the limit of {self._limit:g}"
        return None

    def _step(self, by: int, now: float) -> None:
        self._level += by
        self._stepped = now
        known = "is unknown" if self._temperature is None else f"is {self._temperature:.0f} C"
        verb = "lowered" if by > 0 else "raised"
        self.note = f"detail is {verb} to {self._levels[self._level]}: the temperature {known}"
        if by > 0 and self._sensors.is_throttled():
            self.note += ", and the processor is throttled"

    def values(self) -> dict[str, object]:
        """Return the level of detail and, if it is known, the temperature, for an event."""
        known = {} if self._temperature is None else {"temperature": round(self._temperature, 1)}
        return {"detail": self._levels[self._level], **known}
