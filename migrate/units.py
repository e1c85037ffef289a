"""Sizes, rates and times as people write them, and as people read them.

Owns every unit at the border of the program; inside, everything is an integer in bytes, bytes
per second, or nanoseconds. ``*_text`` functions print exactly (what they print parses to the
same number), ``format_*`` functions round for the eye.
"""

import re
from fractions import Fraction
from typing import Final

NS_PER_S: Final = 1_000_000_000
NS_PER_MS: Final = 1_000_000
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

_BINARY: Final = {"kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_DECIMAL: Final = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE_UNITS: Final = {"": 1, "b": 1, **_BINARY, **_DECIMAL}
_BITS: Final = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "tbit": 10**12}
_TIME_UNITS_NS: Final = {
    "ns": 1,
    "us": 1_000,
    "ms": NS_PER_MS,
    "s": NS_PER_S,
    "min": 60 * NS_PER_S,
    "h": 3600 * NS_PER_S,
}
_QUANTITY: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/]*)\s*", re.ASCII)
_LONGEST: Final = 40
"""Characters; anything longer is a mistake, and converting thousands of digits takes
seconds."""


def parse_size(text: str) -> int:
    """Read a size such as ``512MiB``, ``4KiB``, ``1.5GiB``, ``10MB`` or ``4096``.

    ``KiB MiB GiB TiB`` are powers of 1024, ``kB MB GB TB`` powers of 1000, no unit means bytes.

    Returns:
        Bytes, rounded down to a whole byte.

    Raises:
        ValueError: Not a size; the text says what would be one.
    """
    number, unit = _split(text, "a size", "512MiB")
    if unit.lower() in {"k", "m", "g", "t"}:
        letter = unit.upper()
        raise ValueError(f"'{text}' is ambiguous: write {letter}iB (1024) or {letter}B (1000)")
    factor = _SIZE_UNITS.get(unit.lower())
    if factor is None:
        raise ValueError(f"'{text}' is not a size: unknown unit '{unit}', use KiB, MiB or GiB")
    return int(number * factor)


def parse_rate(text: str) -> int:
    """Read a rate per second such as ``200Mbit``, ``1Gbit`` (bits) or ``10MB`` (bytes).

    A trailing ``/s`` is allowed. Bit units are powers of 1000.

    Returns:
        Bytes per second, rounded down.

    Raises:
        ValueError: Not a rate, no unit, or a unit that could mean bits as well as bytes.
    """
    number, full_unit = _split(text, "a rate", "200Mbit")
    unit = full_unit.removesuffix("/s")
    if unit.lower() in _BITS:
        return int(number * _BITS[unit.lower()] / 8)
    if unit == "":
        raise ValueError(
            f"'{text}' has no unit: write 200Mbit (bits) or 25MB (bytes) per second"
        )
    if unit.endswith(("bps", "Bps")) or re.fullmatch(r"[kKmMgGtT]b", unit):
        raise ValueError(f"'{text}' is ambiguous: write Mbit for bits or MB for bytes")
    factor = _SIZE_UNITS.get(unit.lower())
    if factor is None:
        raise ValueError(f"'{text}' is not a rate: unknown unit '{unit}', use Mbit, Gbit or MB")
    return int(number * factor)


def parse_duration_ns(text: str) -> int:
    """Read a time such as ``300ms``, ``5s`` or ``5min``.

    Returns:
        Nanoseconds, rounded down.

    Raises:
        ValueError: Not a time, or no unit.
    """
    number, unit = _split(text, "a time", "300ms")
    if unit == "":
        raise ValueError(f"'{text}' has no unit: write {text.strip()}ms or {text.strip()}s")
    factor = _TIME_UNITS_NS.get(unit.lower())
    if factor is None:
        raise ValueError(f"'{text}' is not a time: unknown unit '{unit}', use ms, s or min")
    return int(number * factor)


def _split(text: str, what: str, example: str) -> tuple[Fraction, str]:
    match = _QUANTITY.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        shown = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
        raise ValueError(f"'{shown}' is not {what}: write it like {example}")
    return Fraction(match.group(1)), match.group(2)


def size_text(n_bytes: int) -> str:
    """Print a size exactly, in the largest binary unit that divides it: ``64MiB``."""
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if n_bytes and n_bytes % factor == 0:
            return f"{n_bytes // factor}{unit}"
    return str(n_bytes)


def rate_text(rate_bps: int) -> str:
    """Print a rate in bytes per second exactly, in the largest bit unit that divides it."""
    bits = rate_bps * 8
    for unit, factor in (("Gbit", 10**9), ("Mbit", 10**6), ("kbit", 10**3)):
        if bits and bits % factor == 0:
            return f"{bits // factor}{unit}"
    return f"{bits}bit"


def duration_text(duration_ns: int) -> str:
    """Print a time exactly, in the largest unit that divides it: ``300ms``, ``5min``."""
    for unit in ("h", "min", "s", "ms", "us"):
        if duration_ns and duration_ns % _TIME_UNITS_NS[unit] == 0:
            return f"{duration_ns // _TIME_UNITS_NS[unit]}{unit}"
    return f"{duration_ns}ns"


def format_size(n_bytes: float) -> str:
    """Print a size for the eye: three digits and a binary unit, ``1.46 GiB``."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        # 1000, not 1024: a fourth digit would break the columns of the tables.
        if abs(value) < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{_three_digits(value)} {unit}"
        value /= 1024
    return f"{_three_digits(value)} TiB"


def format_rate(rate_bps: float) -> str:
    """Print bytes per second for the eye, as bits: ``197 Mbit/s``."""
    value = float(rate_bps) * 8
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if abs(value) < 999.5:
            return f"{_three_digits(value)} {unit}" if value else f"0 {unit}"
        value /= 1000
    return f"{_three_digits(value)} Gbit/s"


def format_ms(duration_ms: float) -> str:
    """Print milliseconds for the eye: ``312 ms``, ``2 min 03 s``, ``1 h 02 min``."""
    if duration_ms < 999.5:
        return f"{duration_ms:.0f} ms" if duration_ms >= 9.95 else f"{duration_ms:.1f} ms"
    if duration_ms < 99_950:
        return f"{_three_digits(duration_ms / 1000)} s"
    minutes, seconds = divmod(round(duration_ms / 1000), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_count(n: int) -> str:
    """Print a count with thousands apart: ``262 144``."""
    return f"{n:,}".replace(",", " ")


def _three_digits(value: float) -> str:
    if abs(value) < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"
