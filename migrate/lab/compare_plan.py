"""What a comparison does, in which order: pure data, made from the options."""

import fnmatch
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from migrate.lab.compare_guests import GUESTS, GuestKind
from migrate.lab.engine import EngineMode
from migrate.lab.native import NATIVE_MODES
from migrate.units import parse_rate

ENGINE: Final = "engine"
UNSHAPED: Final = "unshaped"
QEMUS: Final = ("7.2", "10.0")
MEMORIES: Final = ("prealloc", "lazy")
WARM_UP: Final = 0
"""``repeat`` of a run that is in no table."""

VARIANT: Final = re.compile(r"(?P<name>[\w.+-]+)(?:@(?P<bin>[^=]+))?=(?P<options>.*)")
OTHER_COMMAND: Final = " // "
"""Between a variant's options for migrate-src and those for migrate-dst."""


class Cell(NamedTuple):
    """What is alike for all ways of one comparison."""

    qemu: str
    guest: str
    link: str
    memory: str

    def __str__(self) -> str:
        return "/".join(self)


class Step(NamedTuple):
    """One run to be made."""

    cell: Cell
    mode: str
    repeat: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared.

    Attributes:
        cells: In the order in which they are run; those of one guest follow each other.
        modes: In the order of the first repeat; each later one starts with the next mode.
        engines: Those modes that are the engine's.
        repeats: Runs of each mode in each cell.
        guests: By name.
        downtime_limit_ms: Of QEMU and of the engine.
        timeout_s: A migration that takes longer did not converge.
        give_up: After so many runs of a mode in a cell that did not converge, its other repeats
            are left out; 0: never.
        congestion_control: TCP's on the link, ``None`` for the machine's default.
    """

    cells: tuple[Cell, ...]
    modes: tuple[str, ...]
    engines: Mapping[str, EngineMode]
    repeats: int
    guests: Mapping[str, GuestKind]
    downtime_limit_ms: int = 300
    timeout_s: float = 120.0
    give_up: int = 0
    congestion_control: str | None = "cubic"

    def steps(self, cell: Cell) -> Iterator[Step]:
        """Yield a cell's runs: the modes in turns, and none always behind the same other."""
        for repeat in range(1, self.repeats + 1):
            first = (repeat - 1) % len(self.modes)
            for mode in self.modes[first:] + self.modes[:first]:
                yield Step(cell, mode, repeat)

    def hosts(self) -> Iterator[tuple[str, str, tuple[Cell, ...]]]:
        """Yield each QEMU and guest, which one source QEMU serves, with its cells."""
        for qemu, guest in dict.fromkeys((cell.qemu, cell.guest) for cell in self.cells):
            mine = [cell for cell in self.cells if (cell.qemu, cell.guest) == (qemu, guest)]
            yield qemu, guest, tuple(mine)

    def has(self, step: Step) -> bool:
        """Whether a run belongs to this plan; warm-ups do not."""
        known = step.cell in self.cells and step.mode in self.modes
        return known and 1 <= step.repeat <= self.repeats

    @property
    def run_count(self) -> int:
        """Runs in all, without warm-ups."""
        return len(self.cells) * self.repeats * len(self.modes)


@dataclass(frozen=True, slots=True)
class Choice:
    """The options that say which cells there are; each is a list of names.

    Attributes:
        patterns: Of ``QEMU/GUEST/LINK/MEMORY``, with wildcards; a cell must match one.
    """

    qemus: Sequence[str]
    guests: Sequence[str]
    links: Sequence[str]
    memories: Sequence[str]
    patterns: Sequence[str] = field(default_factory=lambda: ["*"])

    def cells(self) -> tuple[Cell, ...]:
        """Return the cells.

        Raises:
            ValueError: An unknown name, or no cell is left.
        """
        _check("QEMU", self.qemus, QEMUS)
        _check("guest", self.guests, tuple(GUESTS))
        _check("memory", self.memories, MEMORIES)
        for link in self.links:
            link_rate(link)
        cells = tuple(
            cell
            for qemu in self.qemus
            for guest in self.guests
            for link in self.links
            for memory in self.memories
            if any(
                fnmatch.fnmatchcase(str(cell := Cell(qemu, guest, link, memory)), pattern)
                for pattern in self.patterns
            )
        )
        if not cells:
            raise ValueError(f"no cell matches {', '.join(self.patterns)}")
        return cells


def _check(kind: str, chosen: Sequence[str], possible: Sequence[str]) -> None:
    if unknown := set(chosen) - set(possible):
        raise ValueError(f"expected {kind} of {', '.join(possible)}, got {min(unknown)!r}")


def engine_modes(
    chosen: Sequence[str], variants: Sequence[str], common: EngineMode
) -> dict[str, EngineMode]:
    """Return the engine's modes among the chosen ones.

    Args:
        chosen: Names of modes: native ones, ``engine``, or variants.
        variants: ``NAME[@FOLDER]=[OPTIONS of migrate-src][ // OPTIONS of migrate-dst]``.
        common: What all of them have; a variant's options stand behind these.

    Raises:
        ValueError: An unknown name, or something that is no variant.
    """
    known = {ENGINE: common}
    for text in variants:
        match = VARIANT.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"expected an engine variant as NAME=OPTIONS, got {text!r}")
        if match["name"] in (*NATIVE_MODES, ENGINE):
            raise ValueError(f"{match['name']!r} is a mode already, and no name for a variant")
        source, _, destination = match["options"].partition(OTHER_COMMAND)
        known[match["name"]] = EngineMode(
            (*common.source_options, *shlex.split(source)),
            (*common.destination_options, *shlex.split(destination)),
            Path(match["bin"]) if match["bin"] else common.bin_dir,
            common.attach,
        )
    _check("mode", chosen, (*NATIVE_MODES, *known))
    return {name: known[name] for name in chosen if name in known}


def link_rate(name: str) -> int | None:
    """Return a link's rate in bytes per second, ``None`` if it is not limited.

    Raises:
        ValueError: Neither ``unshaped`` nor a rate.
    """
    return None if name == UNSHAPED else parse_rate(name)
