"""``migrate-lab round-trip``: a guest goes to another host, stays a while, and comes back.

Both hosts keep an old copy of its memory (``--checkpoint``), so that the way back is short.
"""

import argparse
import json
import shlex
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import trio

from migrate.errors import ParamsError
from migrate.lab import file_content, guest_image
from migrate.lab.command_line import (
    INTERRUPTED,
    Say,
    exit_status,
    find_qemu,
    run_until_signal,
    talking_clock,
)
from migrate.lab.compare_guests import GUESTS, add_sizes, resized
from migrate.lab.compare_plan import link_rate
from migrate.lab.compare_table import COLUMNS, SENT, TOTAL, Column, Table, summarize
from migrate.lab.engine import EngineMode
from migrate.lab.guest_vm import GuestConfig
from migrate.lab.measured import Measurement
from migrate.lab.netns import netns_pair
from migrate.lab.qemu_binaries import QemuBinary
from migrate.lab.rig import Rig, level_memory
from migrate.units import KIB, NS_PER_MS, NS_PER_S, parse_duration_ns

SUMMARY: Final = "migrate a guest to another host and back, each host keeping an old copy"
DESCRIPTION: Final = """\
Migrate a lab guest from host A to host B with the engine, let it stay there,
and migrate it back; both hosts keep what they have of its memory
(--checkpoint). Prints both legs and the second divided by the first. Needs root.
"""
LEGS: Final = ("A to B", "B to A")

END: Final = Column("commands ended s", lambda m: _seconds(m.ended_ms), 2)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


@dataclass(frozen=True, slots=True)
class Trip:
    """What is done.

    Attributes:
        config: The guest.
        binary: The QEMU of both hosts.
        link: Its name.
        stay_s: How long the guest stays on host B.
        engine: Options of the commands.
        checkpoint: Whether the hosts keep checkpoints.
        downtime_limit_ms: The engine's.
        timeout_s: For each leg.
    """

    config: GuestConfig
    binary: QemuBinary
    link: str
    stay_s: float
    engine: EngineMode
    checkpoint: bool
    downtime_limit_ms: int
    timeout_s: float

    def mode(self, source_dir: Path, destination_dir: Path) -> EngineMode:
        """Return the engine's options for a leg between two hosts with these folders."""
        if not self.checkpoint:
            return self.engine
        source, destination = (
            ("--checkpoint", str(folder)) for folder in (source_dir, destination_dir)
        )
        return replace(
            self.engine,
            source_options=(*source, *self.engine.source_options),
            destination_options=(*destination, *self.engine.destination_options),
        )

    async def run(self, rig: Rig, say: Say) -> tuple[Measurement, Measurement]:
        """Boot the guest on host A, and move it there and back.

        Raises:
            MigrationError: A leg failed.
        """
        with tempfile.TemporaryDirectory(dir=rig.folder, prefix="hosts-") as folder:
            a, b = (Path(folder) / name for name in "ab")
            for host in (a, b):
                host.mkdir(mode=0o700)
            # A VM's checkpoint is found by its UUID.
            config = replace(self.config, uuid=str(uuid.uuid4()))
            say("booting the guest on host A")
            boot = rig.qemu(config, self.binary, rig.link.source, incoming=False)
            async with boot as at_a:
                await level_memory(config.ram_kib * KIB)
                limit = {"downtime_limit_ms": self.downtime_limit_ms}
                async with rig.engine(self.mode(a, b), config, self.binary, **limit) as to_b:
                    there = await rig.timed(at_a, to_b, self.timeout_s)
                    say(f"{LEGS[0]}: {_leg_text(there)}; it stays for {self.stay_s:g} s")
                    await trio.sleep(self.stay_s)
                    home = rig.turned.engine(self.mode(b, a), config, self.binary, **limit)
                    async with home as to_a:
                        back = await rig.turned.timed(to_b.endpoint, to_a, self.timeout_s)
                    say(f"{LEGS[1]}: {_leg_text(back)}")
        return there, back


def _leg_text(leg: Measurement) -> str:
    pages = leg.report["pages"] if leg.report is not None else {}
    classes = ", ".join(f"{count} {name}" for name, count in pages.items() if count)
    return f"{leg.total_ms / 1e3:.2f} s, {leg.sent_bytes / 1e6:.1f} MB; pages: {classes}"


def trips_table(trips: Sequence[tuple[Measurement, Measurement]]) -> Table:
    """Two rows with medians and ranges of the legs, and one with the second over the first."""
    columns = (*COLUMNS, END)
    rows = []
    for i, name in enumerate(LEGS):
        summaries = [summarize(column.value(trip[i]) for trip in trips) for column in columns]
        cells = [
            "-" if summary is None else summary.text(column.digits)
            for summary, column in zip(summaries, columns, strict=True)
        ]
        rows.append((name, *cells))
    ratios = []
    for column in columns:
        values = [(column.value(there), column.value(back)) for there, back in trips]
        summary = summarize(back / there for there, back in values if there and back)
        ratios.append(summary.text(3) if summary and column in {TOTAL, SENT} else "-")
    rows.append((f"{LEGS[1]} / {LEGS[0]}", *ratios))
    return Table(("leg", *(column.title for column in columns)), tuple(rows), left=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; every one has its unit in its value."""
    add = parser.add_argument
    add("--qemu", default="7.2", metavar="VERSION", help="7.2 or 10.0 (default: 7.2)")
    add("--guest", default="idle", metavar="NAME", help=f"{', '.join(GUESTS)} (default: idle)")
    add("--link", default="200mbit", metavar="RATE", help="or unshaped (default: 200mbit)")
    add("--stay", default="30s", metavar="TIME", help="between the legs (default: 30s)")
    add("--repeats", type=int, default=1, metavar="N", help="trips (default: 1)")
    add("--without", action="store_true", help="without --checkpoint, to compare")
    add("--engine-options", default="", metavar="WORDS", help="more options of migrate-src")
    add("--dst-options", default="", metavar="WORDS", help="more options of migrate-dst")
    add("--downtime-limit", default="300ms", metavar="TIME", help="the engine's")
    add("--timeout", default="120s", metavar="TIME", help="longest time for a leg")
    add_sizes(parser)
    add("--json", type=Path, metavar="FILE", help="write the figures of all legs")
    add("--markdown", action="store_true", help="print the table in Markdown")


def trip_from(options: argparse.Namespace) -> Trip:
    """Check the options, and make what the guest needs.

    Raises:
        ValueError: A value that cannot be.
        MigrationError: There is no QEMU, or no guest.
    """
    link_rate(options.link)
    if options.guest not in GUESTS:
        raise ValueError(f"expected a guest of {', '.join(GUESTS)}, got {options.guest!r}")
    if options.repeats < 1:
        raise ValueError(f"expected at least 1 repeat, got {options.repeats}")
    stay_s = parse_duration_ns(options.stay) / NS_PER_S
    timeout_s = parse_duration_ns(options.timeout) / NS_PER_S
    limit_ms = parse_duration_ns(options.downtime_limit) // NS_PER_MS
    kind = resized(GUESTS[options.guest], options)
    mib = kind.workload.device_mib
    guest_image.build()
    return Trip(
        config=GuestConfig(
            ram_kib=kind.ram_kib,
            machine=f"pc-q35-{options.qemu}",
            workload=kind.workload,
            content=file_content.build(mib).path if mib else None,
            prealloc=True,
        ),
        binary=find_qemu(options.qemu),
        link=options.link,
        stay_s=stay_s,
        engine=EngineMode(
            tuple(shlex.split(options.engine_options)), tuple(shlex.split(options.dst_options))
        ),
        checkpoint=not options.without,
        downtime_limit_ms=limit_ms,
        timeout_s=timeout_s,
    )


def run(options: argparse.Namespace) -> int:
    """Make the trips; 0 when all arrived, 130 after a signal, else an error's code."""
    return exit_status("migrate-lab round-trip", partial(_run, options))


def _run(options: argparse.Namespace) -> int:
    if options.qemu not in ("7.2", "10.0"):
        raise ParamsError(f"expected QEMU 7.2 or 10.0, got {options.qemu!r}")
    trip, say = trip_from(options), talking_clock()
    trips: list[tuple[Measurement, Measurement]] = []

    async def make_trips() -> None:
        with tempfile.TemporaryDirectory(prefix="migrate-lab-") as folder:
            async with netns_pair(congestion_control="cubic") as link:
                await link.shape(link_rate(trip.link))
                while len(trips) < options.repeats:
                    legs = await trip.run(Rig(link, Path(folder)), say)
                    trips.append(legs)

    finished = run_until_signal(make_trips, say)
    if options.json is not None:
        content = {
            "schema": 1,
            "options": {name: str(value) for name, value in vars(options).items()},
            "trips": [[asdict(leg) for leg in legs] for legs in trips],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if trips:
        table = trips_table(trips)
        print(table.markdown() if options.markdown else table.text())
    return 0 if finished else INTERRUPTED
