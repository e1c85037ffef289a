"""One migration as it looks from outside: event times, bytes on the link, CPU time, heartbeats.

The same instruments for every way to migrate, so that ways can be compared. All of them are
outside the engine and outside the guest: QEMU's event stamps (one host, so one clock), the
counters of the link's interfaces, ``/proc``, and the host's clock at both consoles.
"""

import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from migrate.errors import GuestError, GuestOn, QmpInterruptedError
from migrate.lab.console import ConsoleLog, Heartbeats, join_heartbeats, migration_gap_ns
from migrate.lab.netns import NetnsPair
from migrate.lab.processes import MemoryPeak, Side
from migrate.qemu import queries
from migrate.qemu.qmp_client import EventListener, QmpClient
from migrate.report.report import Service, ServiceFigures
from migrate.units import NS_PER_MS, NS_PER_S

HEARTBEATS_AFTER: Final = 20
"""Heartbeats (of 200 a second) the guest must give at the destination: it really runs there."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A QEMU with a lab guest in it, or about to be.

    Attributes:
        pid: QEMU's process.
        console: Its console, read all the time by a task.
        monitor: Ours.
        engine_qmp: Socket of a second monitor, which we leave to the engine.
        workdir: Folder for files of this one QEMU and its command.
    """

    pid: int
    console: ConsoleLog
    monitor: QmpClient
    engine_qmp: Path
    workdir: Path


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of one migration.

    Attributes:
        total_ms: From ``migrate`` on the source QEMU to the destination's RESUME.
        wall_ms: The same from the start of the engine's source process; natively no more.
        downtime_events_ms: From the source's STOP to the destination's RESUME.
        downtime_qemu_ms: What the source QEMU calls downtime.
        downtime_heartbeat_ms: From the last heartbeat on the source's console to the first on the
            destination's; up to a heartbeat period (5 ms) too long.
        sent_bytes: On the link, source to destination.
        returned_bytes: On the link, destination to source.
        cpu_s: CPU time of both QEMUs (the guest's own work in them) and of the engine, from
            ``migrate`` to RESUME.
        start_cpu_s: CPU time the engine's processes had used when they said ``migrate``.
        peak_bytes: Most memory that all processes had at one time; what a QEMU shares with its
            command counts once.
        source_peak_bytes: Most memory that migrate-src had of its own, 0 natively.
        destination_peak_bytes: Likewise migrate-dst.
        data_pages: Pages that the source QEMU sent with content, repetitions included.
        writes_before_per_s: Page writes of the guest in the second before.
        writes_per_s: Page writes of the guest from ``migrate`` on, the pause not counted.
        report: The engine's own report, ``None`` natively.
        service: What the heartbeats say of the guest's progress, see ``heartbeat_service``.
        ended_ms: From the start of migrate-src to the end of both commands, ``None`` natively.
    """

    total_ms: float
    wall_ms: float
    downtime_events_ms: float
    downtime_qemu_ms: int | None
    downtime_heartbeat_ms: float
    sent_bytes: int
    returned_bytes: int
    cpu_s: float
    start_cpu_s: float
    peak_bytes: int = 0
    source_peak_bytes: int = 0
    destination_peak_bytes: int = 0
    data_pages: int | None = None
    writes_before_per_s: float | None = None
    writes_per_s: float | None = None
    report: dict[str, Any] | None = None
    service: Service | None = None
    ended_ms: float | None = None


def heartbeat_service(
    beats: Heartbeats, *, started_ns: int, stopped_ns: int, resumed_ns: int
) -> Service:
    """Count heartbeats per second before, in and after a migration, whichever way it went.

    Rounds cannot be told apart from outside: ``rounds`` has one entry, ``all``. Heartbeats have no
    latency.

    Args:
        beats: Of both consoles, joined; at least one.
        started_ns: Host time of ``migrate``; ``before`` is the second before it.
        stopped_ns: Host time of the stop.
        resumed_ns: Host time of the resume; ``after`` lasts to the last heartbeat.
    """
    done_ns = beats.host_ns

    def figures(from_ns: int, to_ns: int) -> ServiceFigures:
        count = int(((done_ns >= from_ns) & (done_ns < to_ns)).sum())
        lasted_ns = max(0, to_ns - from_ns)
        rate = count * NS_PER_S / lasted_ns if lasted_ns else None
        return {
            "duration_ms": lasted_ns / NS_PER_MS,
            "completed": count,
            "completed_per_s": rate,
        }

    first_ns, last_ns = int(done_ns[0]), int(done_ns[-1])
    around = done_ns[max(0, int(np.searchsorted(done_ns, stopped_ns)) - 1) :]
    around = around[: int(np.searchsorted(around, resumed_ns)) + 1]
    return Service(
        unit="heartbeats/s",
        before=figures(max(started_ns - NS_PER_S, first_ns), started_ns),
        rounds={"all": figures(started_ns, stopped_ns)},
        downtime=figures(stopped_ns, resumed_ns),
        downtime_gap_ms=int(np.diff(around).max()) / NS_PER_MS if len(around) > 1 else None,
        after=figures(resumed_ns, last_ns),
    )


class Stopwatch:
    """Watches one migration; from ``stopwatch``.

    Attributes:
        resumed: Set when the guest runs at the destination.
        launched_us: When the engine's source process was started, by the event clock.
        ended_us: When both of the engine's commands had ended.
        sides: Processes of the source's host and of the destination's.
    """

    def __init__(self, source: Endpoint, destination: Endpoint, link: NetnsPair) -> None:
        self.resumed = trio.Event()
        self.launched_us: int | None = None
        self.ended_us: int | None = None
        self.sides = (Side(source.pid), Side(destination.pid))
        self._memory = MemoryPeak(self.sides)
        self._source = source
        self._destination = destination
        self._link = link
        self._bytes_before = (0, 0)
        self._started_us = self._stopped_us = self._resumed_us = 0
        self._cpu_before_s = self._cpu_after_s = self._start_cpu_s = 0.0

    async def read_counters(self) -> tuple[int, int]:
        """Return the bytes sent so far by the source's and the destination's end of the link."""
        return await self._link.source.sent_bytes(), await self._link.destination.sent_bytes()

    async def begin(self) -> None:
        """Read the byte counters before anything is sent."""
        self._bytes_before = await self.read_counters()

    async def follow_source(self, events: EventListener) -> None:
        """Take the moment of ``migrate`` and the last stop before the guest resumes elsewhere."""
        with contextlib.suppress(QmpInterruptedError):
            while not self.resumed.is_set():
                event = await events.next()
                if event.name == "STOP":
                    self._stopped_us = event.timestamp_us or 0
                elif event.data.get("status") == "setup":
                    self._started_us = event.timestamp_us or 0
                    self._start_cpu_s = sum(side.command_cpu_s() for side in self.sides)
                    self._cpu_before_s = self._cpu_s()

    async def follow_destination(self, events: EventListener) -> None:
        """Take the moment at which the guest runs at the destination."""
        with contextlib.suppress(QmpInterruptedError):
            event = await events.next()
            self._resumed_us = event.timestamp_us or 0
            self._cpu_after_s = self._cpu_s()
            self.resumed.set()

    async def follow_memory(self) -> None:
        """Look at the memory of all processes, until cancelled."""
        await self._memory.follow()

    async def finish(self, report: dict[str, Any] | None) -> Measurement:
        """Wait until the guest lives at the destination, and add up. The caller sets a deadline.

        Raises:
            GuestError: A figure is missing, the heartbeats are not those of one running guest, or
                the guest found damage in its memory.
        """
        await self.resumed.wait()
        await self._wait_alive()
        gap_ns = migration_gap_ns(self._source.console, self._destination.console)
        status = await queries.query_migrate_settled(self._source.monitor)
        if not 0 < self._started_us <= self._stopped_us <= self._resumed_us:
            raise GuestError(
                "events out of order: expected migrate, STOP, RESUME, got "
                f"{self._started_us}, {self._stopped_us}, {self._resumed_us} µs",
                guest_on=GuestOn.DESTINATION,
            )
        after = await self.read_counters()
        launched_us = self.launched_us or self._started_us
        writes_before_per_s, writes_per_s = self._writes()
        return Measurement(
            total_ms=(self._resumed_us - self._started_us) / 1e3,
            wall_ms=(self._resumed_us - launched_us) / 1e3,
            downtime_events_ms=(self._resumed_us - self._stopped_us) / 1e3,
            downtime_qemu_ms=status.downtime_ms,
            downtime_heartbeat_ms=gap_ns / 1e6,
            sent_bytes=after[0] - self._bytes_before[0],
            returned_bytes=after[1] - self._bytes_before[1],
            cpu_s=self._cpu_after_s - self._cpu_before_s,
            start_cpu_s=self._start_cpu_s,
            peak_bytes=self._memory.bytes,
            source_peak_bytes=self.sides[0].command_peak,
            destination_peak_bytes=self.sides[1].command_peak,
            data_pages=None if status.ram is None else status.ram.normal_pages,
            writes_before_per_s=writes_before_per_s,
            writes_per_s=writes_per_s,
            report=report,
            service=self._service(),
            ended_ms=None if self.ended_us is None else (self.ended_us - launched_us) / 1e3,
        )

    async def _wait_alive(self) -> None:
        console = self._destination.console
        await console.wait_heartbeats(HEARTBEATS_AFTER)
        if self._source.console.dirty:
            await console.wait_until(lambda log: len(log.dirty) > 0, "page writes")
        if damage := [*self._source.console.bad, *console.bad]:
            raise GuestError(f"the guest says: {damage[0]}", guest_on=GuestOn.DESTINATION)

    def _writes(self) -> tuple[float | None, float | None]:
        """Page writes per second before and during the migration; ``None`` where none are told."""
        reports = self._source.console.dirty
        started_ns, stopped_ns, resumed_ns = self._moments_ns()
        last = [report for report in reports if report.host_ns <= started_ns]
        if not last or not self._destination.console.dirty:
            return None, None
        first = next(
            report for report in last if report.host_ns > last[-1].host_ns - 2 * NS_PER_S
        )
        arrived = self._destination.console.dirty[0]
        before_ns = last[-1].host_ns - first.host_ns
        during_ns = arrived.host_ns - last[-1].host_ns - (resumed_ns - stopped_ns)
        return (
            (last[-1].written - first.written) * NS_PER_S / before_ns if before_ns else None,
            (arrived.written - last[-1].written) * NS_PER_S / during_ns,
        )

    def _moments_ns(self) -> tuple[int, int, int]:
        """``migrate``, stop and resume by the clock of the consoles."""
        # Events are stamped by the realtime clock, heartbeats by the monotonic one.
        ahead_ns = time.time_ns() - time.monotonic_ns()
        moments_us = self._started_us, self._stopped_us, self._resumed_us
        started_ns, stopped_ns, resumed_ns = (us * 1000 - ahead_ns for us in moments_us)
        return started_ns, stopped_ns, resumed_ns

    def _service(self) -> Service:
        started_ns, stopped_ns, resumed_ns = self._moments_ns()
        return heartbeat_service(
            join_heartbeats(self._source.console, self._destination.console),
            started_ns=started_ns,
            stopped_ns=stopped_ns,
            resumed_ns=resumed_ns,
        )

    def _cpu_s(self) -> float:
        return sum(side.cpu_s() for side in self.sides)


@asynccontextmanager
async def stopwatch(
    source: Endpoint, destination: Endpoint, link: NetnsPair
) -> AsyncIterator[Stopwatch]:
    """Watch the migration that happens in the block; needs capability ``events`` at the source."""
    watch = Stopwatch(source, destination, link)
    await watch.begin()
    with (
        source.monitor.listen("MIGRATION", "STOP") as at_source,
        destination.monitor.listen("RESUME") as at_destination,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.follow_source, at_source)
            nursery.start_soon(watch.follow_destination, at_destination)
            nursery.start_soon(watch.follow_memory)
            yield watch
            nursery.cancel_scope.cancel()
