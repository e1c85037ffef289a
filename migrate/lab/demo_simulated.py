"""What ``tools/demo`` shows without QEMU: a simulated guest migrated by the two commands.

The proof comes from both reports and from the guest's own devices: their clients number every
request and know what was answered, twice or never; the trace of migrate-dst has their counts.
"""

import argparse
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from migrate.guests.simulated_facts import COUNTS_EVENT
from migrate.lab.commands import Command, running_command
from migrate.lab.demo_stage import (
    Fact,
    judge,
    run_source,
    say,
    step,
    tell,
    tell_failure,
)
from migrate.simulation.profile import Profile, load_profile
from migrate.units import format_count, format_ms, format_size

PROFILE: Final = "web"
RUN_FOR: Final = "2s"
MIGRATION_S: Final = 180.0

MISTAKES: Final = (
    "rx_damaged", "tx_damaged", "control_errors", "unexpected_answers", "io_errors", "damaged",
    "order_errors", "stray", "foreign_writes", "ring_errors", "bad_pages",
)  # fmt: skip
"""Counts of devices that are 0 if nothing was lost, damaged, repeated or overtaken."""

ENDS: Final = (
    ("requests_sent", "requests_completed", "{} requests, {} answered"),
    ("lines_written", "lines_seen", "{} lines written, {} seen"),
    ("lines_typed", "lines_got", "{} typed, {} read"),
)
"""What is counted at both ends, and equal once nothing is under way; and how to tell it."""

Document = Mapping[str, Any]


class SimulatedDemo:
    """The demo with one profile."""

    def __init__(self, profile: str) -> None:
        """Look at the profile.

        Args:
            profile: Path of a TOML file, or a shipped one's name.

        Raises:
            ParamsError: There is no such profile, or it is none.
        """
        self._name = profile
        self._profile = load_profile(profile)

    async def run(self, folder: Path, source_options: Sequence[str]) -> int:
        """Migrate, prove, clean up; returns an exit code.

        Args:
            folder: Empty; reports and records go here.
            source_options: More options for migrate-src.
        """
        tell(
            "A simulated guest moves from one process to another while it works. Engine, link "
            "and reports are those of a real migration; only the guest is none. The link is "
            "held at a limited speed."
        )
        step(f"1. The guest: {describe(self._profile)}.")
        private = ("--state-dir", str(folder / "state"))
        user_report = report_option(source_options)
        reports = user_report or folder / "source.json", folder / "destination.json"
        trace = folder / "destination.jsonl"
        hidden = ("--run-dir", str(folder / "run"), "--trace", str(trace))
        own_report = ("--report", str(reports[0])) if reports[0] != user_report else ()
        with trio.fail_after(MIGRATION_S):
            async with _waiting_destination(reports[1], *private, *hidden) as arrival:
                destination, address = arrival
                step("3. On the source's host, send it there:")
                way = ("--to", address, "--simulate", self._name)
                status = await run_source(way, source_options, *private, *own_report)
                status = status or await destination.process.wait()
                if status:
                    await tell_failure(destination)
                    return status
                _tell_destination(destination)
        step("5. Look at both reports, and ask the guest's devices and their clients:")
        source, arrived = (json.loads(path.read_bytes()) for path in reports)
        counts = read_counts(trace)
        served = any(values.get("requests_sent") for values in counts.values())
        facts = [*request_facts(counts), *report_facts(source, arrived, served=served)]
        return judge(facts, "Both commands have ended and the demo's files are removed.")


@asynccontextmanager
async def _waiting_destination(
    report: Path, *hidden: str
) -> AsyncIterator[tuple[Command, str]]:
    options = ("--listen", "127.0.0.1:0", "--simulate", "--run-for", RUN_FOR)
    step("2. On the destination's host, wait for the guest, and let it live there for a while:")
    say(f"   $ migrate-dst {' '.join(options)}")
    async with running_command(
        "migrate-dst", *options, "--report", str(report), *hidden
    ) as command:
        line = await command.wait_line("listening on ")
        yield command, line.split("listening on ")[1].split()[0]


def report_option(source_options: Sequence[str]) -> Path | None:
    """Find where the user wants the report of migrate-src, which takes ``--report`` only once."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--report", type=Path)
    report: Path | None = parser.parse_known_args(source_options)[0].report
    return report


def describe(profile: Profile) -> str:
    """Say in a line what a profile's guest is."""
    devices = ", ".join(dict.fromkeys(device.kind for device in profile.devices))
    what = profile.description.rstrip(".") or "no description"
    text = f"profile '{profile.name}' ({what}), {format_size(profile.ram_bytes)} of RAM"
    return f"{text}; {devices}" if devices else text


def _tell_destination(destination: Command) -> None:
    step("4. And on the destination's host, when the guest had lived there for a while:")
    say()
    lines = destination.lines
    first = next((n for n, line in enumerate(lines) if line.startswith("migration ")), 0)
    for line in lines[first:]:
        say(line)


# --- proof ---------------------------------------------------------------------------------------


def read_counts(trace: Path) -> dict[str, dict[str, int]]:
    """Read the counts of every device from a trace of migrate-dst, by the device's name."""
    events = map(json.loads, trace.read_text(encoding="utf-8").splitlines())
    return {
        event["device"]: event["counts"] for event in events if event["event"] == COUNTS_EVENT
    }


def request_facts(counts: Mapping[str, Mapping[str, int]]) -> Iterator[Fact]:
    """Judge what each device, its driver and its client counted from power-on to the end.

    Args:
        counts: By device, after nothing new was asked for a while.
    """
    for name, values in counts.items():
        told, good = [], True
        for first, second, text in ENDS:
            if first in values:
                good = good and values[first] == values[second]
                numbers = format_count(values[first]), format_count(values[second])
                told.append(text.format(*numbers))
        if lost := values.get("requests_outstanding"):
            good = False
            told.append(f"{lost} never answered")
        bad = {key: values[key] for key in MISTAKES if values.get(key)}
        mistakes = (f"{number} {key.replace('_', ' ')}" for key, number in bad.items())
        told.append(", ".join(mistakes) or "0 wrong")
        yield Fact(name, good and not bad, ", ".join(told))


def report_facts(source: Document, destination: Document, *, served: bool) -> Iterator[Fact]:
    """Judge what both reports say of the same migration.

    Args:
        source: Report of migrate-src.
        destination: Report of migrate-dst.
        served: Whether somebody asked the guest for anything.
    """
    both = (source, destination)
    proofs = [report["integrity"] for report in both]
    digests = {
        proof[key] for proof in proofs for key in ("source_digest", "destination_digest")
    }
    equal = all(proof["equal"] for proof in proofs) and len(digests) == 1
    pages = format_count(proofs[1]["pages"])
    yield Fact(
        "memory", equal, f"{pages} pages compared, {'all' if equal else 'NOT all'} equal"
    )
    yield _ring_fact(both)
    where = [f"{report['guest_on']}, {report['guest_state']}" for report in both]
    good = where == ["destination, running"] * 2
    yield Fact("guest", good, f"{where[0]}, says migrate-src; {where[1]}, says migrate-dst")
    if served:
        yield _service_fact(destination["service"])
    yield _clock_fact(source, destination)


def _ring_fact(reports: Sequence[Document]) -> Fact:
    sides = [
        [queue["consistent"] for device in report["devices"] for queue in device["virtqueues"]]
        for report in reports
    ]
    good = all(all(side) for side in sides) and len(sides[0]) == len(sides[1])
    wrong = sum(value is not True for side in sides for value in side)
    return Fact(
        "rings", good, f"{len(sides[0])} virtqueues, {wrong} not consistent with memory"
    )


def _service_fact(service: Document | None) -> Fact:
    if service is None:
        return Fact("service", False, "not measured")
    phases = (
        service["before"],
        *service["rounds"].values(),
        service["downtime"],
        service["after"],
    )
    lost = round(sum(phase.get("lost") or 0 for phase in phases))
    gap_ms = service["downtime_gap_ms"]
    gap = "no gap known" if gap_ms is None else f"{format_ms(gap_ms)} without an answer at most"
    served = bool(service["after"].get("completed"))
    after = "answers since" if served else "NO answer since"
    return Fact("service", served and not lost, f"{gap}; {lost} requests lost; {after}")


def _clock_fact(source: Document, destination: Document) -> Fact:
    """Look at the guest's clock, which stood still, and must not have gone back or been lost."""
    jump_ms, downtime_ms = destination["guest_clock_jump_ms"], source["downtime_ms"]
    good = jump_ms is not None and downtime_ms is not None and jump_ms >= 0
    text = "not known"
    if good:
        text = f"{format_ms(jump_ms)} behind the world's; downtime {format_ms(downtime_ms)}"
    return Fact("clock", good, text)
