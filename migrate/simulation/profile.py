"""What a simulated guest is and does: a TOML file, read strictly.

The same map travels in the guest's state to the destination, so everything here is checked as a
peer's word would be. ``docs/simulation.md`` explains the format for people.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast, get_args

from migrate.errors import ParamsError
from migrate.simulation.content import ContentMix, WrittenContent
from migrate.units import (
    GIB,
    KIB,
    MIB,
    NS_PER_MS,
    duration_text,
    parse_duration_ns,
    parse_size,
    size_text,
)
from proto.guest_events import PAGE_SIZE

Locality = Literal["uniform", "zipf", "sequential"]

MIN_RAM_BYTES: Final = 1 * MIB
MAX_RAM_BYTES: Final = 1024 * GIB
MAX_ZIPF_BYTES: Final = 4 * GIB
"""A zipf working set takes 8 bytes of table a page."""

MAX_VCPUS: Final = 64
MAX_PHASES: Final = 64
MAX_DEVICES: Final = 32
MAX_OPTIONS: Final = 64
MAX_TOTAL_RATE: Final = 10_000_000
"""Page writes per second of all vCPUs; more could not be simulated in real time."""

MAX_PROFILE_BYTES: Final = 64 * KIB
MAX_NAME_CHARS: Final = 64
MAX_TEXT_CHARS: Final = 512
FIRST_AREA: Final = 1 * MIB
"""Device areas begin here; below is nothing, as on a PC."""

DEFAULT_AREA_BYTES: Final = 4 * MIB
MAX_WARM_UP_NS: Final = 60_000 * NS_PER_MS
MAX_PHASE_NS: Final = 86_400_000 * NS_PER_MS

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Phase:
    """What a vCPU does for a while.

    Attributes:
        duration_ns: How long, before the next phase begins.
        rate: Page writes per second.
        working_set_bytes: Size of the region it writes to.
        offset_bytes: Where the region begins; None = behind the device areas.
        locality: ``uniform``, ``zipf`` (few hot pages) or ``sequential``.
        skew: Exponent of zipf; around 1 as measured for caches and databases.
        bytes_per_write: Bytes that one write touches, in whole 8-byte words.
        content: What it writes: ``random``, ``text`` or ``zero``.
    """

    duration_ns: int
    rate: int
    working_set_bytes: int
    offset_bytes: int | None = None
    locality: Locality = "uniform"
    skew: float = 0.99
    bytes_per_write: int = 64
    content: WrittenContent = "random"


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device with the load on it.

    Attributes:
        kind: As ``SimulatedDevice.kind``.
        name: Unique in the guest.
        area_bytes: Guest RAM reserved for its rings and buffers.
        options: What its kind takes.
    """

    kind: str
    name: str
    area_bytes: int
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Profile:
    """A simulated guest.

    Attributes:
        name: What it is called.
        description: For people.
        ram_bytes: Size of guest RAM.
        seed: Of everything that is left to chance.
        warm_up_ns: Guest time that it lives through before the migration begins.
        content: What RAM holds at power-on.
        vcpus: For each vCPU its phases, which repeat.
        devices: Its devices.
    """

    name: str
    description: str
    ram_bytes: int
    seed: int = 1
    warm_up_ns: int = 0
    content: ContentMix = field(default_factory=ContentMix)
    vcpus: tuple[tuple[Phase, ...], ...] = ()
    devices: tuple[DeviceSpec, ...] = field(default=())

    def __post_init__(self) -> None:
        names = [device.name for device in self.devices]
        if len(set(names)) != len(names):
            raise ParamsError("expected devices with different names")
        if self.areas_end > self.ram_bytes:
            raise ParamsError(f"the devices' areas do not fit {size_text(self.ram_bytes)} RAM")
        for phase in (phase for phases in self.vcpus for phase in phases):
            start = self.offset_of(phase)
            if start < self.areas_end and self.devices:
                raise ParamsError("a working set lies in the devices' areas")
            if start + phase.working_set_bytes > self.ram_bytes:
                raise ParamsError(
                    f"a working set of {size_text(phase.working_set_bytes)} at "
                    f"{size_text(start)} ends outside of RAM"
                )
        if sum(max(p.rate for p in phases) for phases in self.vcpus) > MAX_TOTAL_RATE:
            raise ParamsError(f"expected at most {MAX_TOTAL_RATE} page writes per second")

    @property
    def areas_end(self) -> int:
        """First address behind the device areas, a whole MiB."""
        end = FIRST_AREA + sum(device.area_bytes for device in self.devices)
        return -(-end // MIB) * MIB if self.devices else 0

    def areas(self) -> list[tuple[int, int]]:
        """Address and length of each device's area."""
        found, address = [], FIRST_AREA
        for device in self.devices:
            found.append((address, device.area_bytes))
            address += device.area_bytes
        return found

    def offset_of(self, phase: Phase) -> int:
        """Address at which a phase's working set begins."""
        return self.areas_end if phase.offset_bytes is None else phase.offset_bytes

    def to_map(self) -> dict[str, Any]:
        """Plain values that ``read_profile`` reads back as the same profile."""
        mix = self.content
        return {
            "name": self.name,
            "description": self.description,
            "ram": size_text(self.ram_bytes),
            "seed": self.seed,
            "warm_up": duration_text(self.warm_up_ns),
            "content": {name: getattr(mix, name) for name in _CONTENT},
            "vcpus": [{"phases": [_phase_map(p) for p in phases]} for phases in self.vcpus],
            "devices": [
                {"kind": d.kind, "name": d.name, "area": size_text(d.area_bytes), **d.options}
                for d in self.devices
            ],
        }


_CONTENT: Final = ("random", "text", "repeated", "half")
_PHASE: Final = (
    "rate", "working_set", "offset", "locality", "skew", "bytes_per_write", "content",
)  # fmt: skip


def shipped_names() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = resources.files(__package__) / "profiles"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir()
                  if entry.name.endswith(".toml"))  # fmt: skip


def load_profile(name: str) -> Profile:
    """Read a shipped profile, or a TOML file where ``name`` has a suffix or a slash.

    Raises:
        ParamsError: There is none, or it says something that cannot be.
    """
    is_file = "/" in name or name.endswith(".toml")
    if not is_file and name not in shipped_names():
        shipped = ", ".join(shipped_names())
        raise ParamsError(f"no profile '{name}': expected a file FILE.toml or one of {shipped}")
    try:
        if is_file:
            path = Path(name)
            if path.stat().st_size > MAX_PROFILE_BYTES:
                raise ParamsError(f"profile {name}: larger than {size_text(MAX_PROFILE_BYTES)}")
            text, own_name = path.read_text(), path.stem
        else:
            file = resources.files(__package__) / "profiles" / f"{name}.toml"
            text, own_name = file.read_text(), name
        return read_profile({"name": own_name, **tomllib.loads(text)})
    except OSError as error:
        raise ParamsError(f"cannot read profile {name}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ParamsError(f"profile {name} is no TOML: {error}") from error
    except ParamsError as error:
        raise ParamsError(f"profile {name}: {error}") from error


def read_profile(value: Mapping[str, Any]) -> Profile:
    """Check a profile's map.

    Raises:
        ParamsError: A key is unknown or missing, or a value is out of range.
    """
    table = _Table(value, "profile")
    ram_bytes = table.size("ram", MIN_RAM_BYTES, MAX_RAM_BYTES)
    profile = Profile(
        name=table.text("name", MAX_NAME_CHARS),
        description=table.text("description", MAX_TEXT_CHARS, ""),
        ram_bytes=ram_bytes,
        seed=table.integer("seed", 0, 2**32 - 1, 1),
        warm_up_ns=table.duration("warm_up", 0, MAX_WARM_UP_NS, "0ms"),
        content=_read_content(table.table("content")),
        vcpus=tuple(_read_vcpu(t) for t in table.tables("vcpus", MAX_VCPUS)),
        devices=tuple(
            _read_device(t, i) for i, t in enumerate(table.tables("devices", MAX_DEVICES))
        ),
    )
    table.done()
    return profile


def _read_content(table: "_Table") -> ContentMix:
    shares = {name: table.number(name, 0.0, 1.0, 0.0) for name in _CONTENT}
    table.done()
    if sum(shares.values()) > 1.0 + 1e-9:
        raise ParamsError(
            f"content: expected shares up to 1 in all, got {sum(shares.values())}"
        )
    return ContentMix(**shares)


def _read_vcpu(table: "_Table") -> tuple[Phase, ...]:
    common = {key: table.take(key) for key in _PHASE if key in table}
    phases = table.tables("phases", MAX_PHASES)
    table.done()
    if not phases:
        return (_read_phase(_Table({"duration": "1h", **common}, table.where)),)
    return tuple(_read_phase(phase.over(common)) for phase in phases)


def _read_phase(table: "_Table") -> Phase:
    locality = table.one_of("locality", get_args(Locality), "uniform")
    limit = MAX_ZIPF_BYTES if locality == "zipf" else MAX_RAM_BYTES
    phase = Phase(
        duration_ns=table.duration("duration", NS_PER_MS, MAX_PHASE_NS),
        rate=table.integer("rate", 0, MAX_TOTAL_RATE),
        working_set_bytes=table.size("working_set", PAGE_SIZE, limit),
        offset_bytes=table.size("offset", 0, MAX_RAM_BYTES) if "offset" in table else None,
        locality=cast("Locality", locality),
        skew=table.number("skew", 0.0, 4.0, 0.99),
        bytes_per_write=table.integer("bytes_per_write", 1, PAGE_SIZE, 64),
        content=cast(
            "WrittenContent", table.one_of("content", get_args(WrittenContent), "random")
        ),
    )
    table.done()
    return phase


def _read_device(table: "_Table", number: int) -> DeviceSpec:
    kind = table.text("kind", MAX_NAME_CHARS)
    spec = DeviceSpec(
        kind=kind,
        name=table.text("name", MAX_NAME_CHARS, f"{kind}.{number}"),
        area_bytes=table.size("area", PAGE_SIZE, GIB, size_text(DEFAULT_AREA_BYTES)),
        options=table.rest(),
    )
    if len(spec.options) > MAX_OPTIONS:
        raise ParamsError(f"device {spec.name}: expected at most {MAX_OPTIONS} options")
    return spec


def _phase_map(phase: Phase) -> dict[str, Any]:
    values = {
        "duration": duration_text(phase.duration_ns),
        "rate": phase.rate,
        "working_set": size_text(phase.working_set_bytes),
        "locality": phase.locality,
        "skew": phase.skew,
        "bytes_per_write": phase.bytes_per_write,
        "content": phase.content,
    }
    if phase.offset_bytes is not None:
        values["offset"] = size_text(phase.offset_bytes)
    return values


_MISSING: Final = object()


class _Table:
    """A TOML table that is emptied as it is read, so that what is left over is a mistake."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ParamsError(f"{where}: expected a table, got {type(values).__name__}")
        self._values = dict(values)
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def over(self, defaults: Mapping[str, Any]) -> "_Table":
        """The same table with defaults for what it does not say."""
        return _Table({**defaults, **self._values}, self.where)

    def take(self, key: str, default: object = _MISSING) -> Any:  # noqa: ANN401 - TOML's own
        """Remove and return a value."""
        value = self._values.pop(key, default)
        if value is _MISSING:
            raise ParamsError(f"{self.where}: expected a value for '{key}', got none")
        return value

    def rest(self) -> dict[str, Any]:
        """Everything that was not read."""
        values, self._values = self._values, {}
        return values

    def done(self) -> None:
        """Refuse what was not read."""
        if self._values:
            raise ParamsError(f"{self.where}: no such key: '{min(self._values)[:40]}'")

    def table(self, key: str) -> "_Table":
        return _Table(self.take(key, {}), f"{self.where}.{key}")

    def tables(self, key: str, most: int) -> "list[_Table]":
        items = self.take(key, [])
        if not isinstance(items, list | tuple) or len(items) > most:
            raise ParamsError(f"{self.where}: expected at most {most} tables '{key}'")
        return [_Table(item, f"{self.where}.{key}[{i}]") for i, item in enumerate(items)]

    def text(self, key: str, most: int, default: object = _MISSING) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            raise ParamsError(
                f"{self.where}.{key}: expected a line of at most {most} characters"
            )
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.take(key, default)
        if value not in allowed:
            raise ParamsError(f"{self.where}.{key}: expected {' or '.join(allowed)}")
        return cast("str", value)

    def integer(self, key: str, low: int, high: int, default: object = _MISSING) -> int:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ParamsError(f"{self.where}.{key}: expected a whole number, {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float) -> float:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ParamsError(f"{self.where}.{key}: expected a number")
        if not low <= value <= high:
            raise ParamsError(f"{self.where}.{key}: expected {low} to {high}, got {value}")
        return float(value)

    def size(self, key: str, low: int, high: int, default: object = _MISSING) -> int:
        """A size in bytes, a multiple of the page size."""
        n_bytes = self._parsed(key, parse_size, default)
        if not low <= n_bytes <= high or n_bytes % PAGE_SIZE:
            raise ParamsError(
                f"{self.where}.{key}: expected pages of 4KiB, {size_text(low)} to "
                f"{size_text(high)}, got {size_text(n_bytes)}"
            )
        return n_bytes

    def duration(self, key: str, low: int, high: int, default: object = _MISSING) -> int:
        """A time in nanoseconds."""
        duration_ns = self._parsed(key, parse_duration_ns, default)
        if not low <= duration_ns <= high:
            raise ParamsError(
                f"{self.where}.{key}: expected {duration_text(low)} to {duration_text(high)}"
            )
        return duration_ns

    def _parsed(self, key: str, parse: Callable[[str], T], default: object) -> T:
        value = self.take(key, default)
        if not isinstance(value, str):
            raise ParamsError(f"{self.where}.{key}: expected a text with a unit")
        try:
            return parse(value)
        except ValueError as error:
            raise ParamsError(f"{self.where}.{key}: {error}") from error
