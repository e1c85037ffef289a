"""Options of simulated devices as a profile gives them: names, kinds and limits in one table.

A table maps the name of an option to an ``Option``; times come in microseconds or milliseconds as
people write them, and leave as integers in nanoseconds under ``*_ns`` names.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from migrate.errors import ParamsError

Reader = Callable[[str, object], object]
"""``read(where, value)`` returns the value to use, or raises ``ParamsError``."""

_US_NS: Final = 1_000
_MS_NS: Final = 1_000_000

MIN_PERIOD_NS: Final = 10_000
"""Of what goes on by itself, whether or not anybody waits for it."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        default: What stands for it where the profile is silent; read like a given one.
        read: Checks and converts.
        becomes: Name it is handed on under; empty for its own.
    """

    default: object
    read: Reader
    becomes: str = ""


def read_options(
    where: str, table: Mapping[str, Option], given: Mapping[str, object]
) -> dict[str, Any]:
    """Check all options of a device.

    Args:
        where: Names the device in errors.
        table: The options there are.
        given: What the profile says.

    Returns:
        A value for every option of the table, under the names it hands them on.

    Raises:
        ParamsError: An option that is not in the table, or a value that cannot be.
    """
    unknown = sorted(set(given) - set(table))
    if unknown:
        raise ParamsError(
            f"{where}: no option '{unknown[0]}'; there are {', '.join(sorted(table))}"
        )
    return {
        option.becomes or name: option.read(f"{where}: {name}", given.get(name, option.default))
        for name, option in table.items()
    }


def whole(low: int, high: int) -> Reader:
    """Read an integer from ``low`` to ``high``."""

    def read(where: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ParamsError(
                f"{where}: expected an integer from {low} to {high}, got {value!r}"
            )
        return value

    return read


def real(low: float, high: float) -> Reader:
    """Read a number from ``low`` to ``high``."""

    def read(where: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ParamsError(f"{where}: expected a number, got {value!r}")
        if not (math.isfinite(value) and low <= value <= high):
            raise ParamsError(f"{where}: expected {low:g} to {high:g}, got {value:g}")
        return float(value)

    return read


def switch(where: str, value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise ParamsError(f"{where}: expected true or false, got {value!r}")
    return value


def word(*allowed: str) -> Reader:
    """Read one of the given words."""

    def read(where: str, value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ParamsError(f"{where}: expected {' or '.join(allowed)}, got {value!r}")
        return value

    return read


def _time(unit_ns: int, low_ns: int, high: float) -> Reader:
    number = real(0, high)

    def read(where: str, value: object) -> int:
        nanoseconds = round(number(where, value) * unit_ns)  # type: ignore[operator]
        if nanoseconds < low_ns:
            raise ParamsError(f"{where}: expected more than {value}, which is next to nothing")
        return nanoseconds

    return read


def microseconds(high: float = 1e9, *, low_ns: int = 0) -> Reader:
    """Read a time in microseconds; gives integer nanoseconds."""
    return _time(_US_NS, low_ns, high)


def milliseconds(high: float = 1e9, *, low_ns: int = 0) -> Reader:
    """Read a time in milliseconds; gives integer nanoseconds."""
    return _time(_MS_NS, low_ns, high)


def period_ms(where: str, value: object) -> int:
    """Read milliseconds between repetitions, at least ``MIN_PERIOD_NS``; 0 stays 0: never."""
    return milliseconds(low_ns=MIN_PERIOD_NS if value else 0)(where, value)  # type: ignore[return-value]


def virtio_table(*, queue_size: int, packed: bool = False) -> dict[str, Option]:
    """Options that every virtio device has.

    Args:
        queue_size: Default size of its queues.
        packed: Whether it offers packed rings.
    """
    table = {
        "queue_size": Option(queue_size, whole(2, 32768)),
        "event_idx": Option(True, switch),
        "indirect": Option(True, switch),
        "exit_us": Option(2.0, microseconds(1e6), "exit_ns"),
        "kick_us": Option(8.0, microseconds(1e6), "kick_ns"),
        "interrupt_us": Option(6.0, microseconds(1e6), "interrupt_ns"),
    }
    if packed:
        table["packed"] = Option(False, switch)
    return table


VHOST_TABLE: Final[Mapping[str, Option]] = {
    "vhost": Option(False, switch),
    "vhost_kick_us": Option(3.0, microseconds(1e6), "vhost_kick_ns"),
    "vhost_interrupt_us": Option(2.5, microseconds(1e6), "vhost_interrupt_ns"),
}
"""Options of devices whose data path can move into the host's kernel: no device process to wake
up on a notification, no system call to interrupt the guest."""
