"""One migration as it looks from outside: event times, bytes on the link, CPU time, heartbeats.

The same instruments for every way to migrate, so that ways can be compared. All of them are
outside the engine and outside the guest: QEMU's event stamps (one host, so one clock), the
counters of the link's interfaces, ``/proc``, and the host's clock at both consoles.
"""

import contextlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from migrate.errors import GuestError, GuestOn, QmpInterruptedError
from migrate.lab.console import Heartbeats, join_heartbeats, migration_gap_ns
from migrate.lab.guest_vm import Guest
from migrate.lab.netns import NetnsPair
from migrate.qemu import queries
from migrate.qemu.qmp_client import EventListener, QmpClient
from migrate.report.report import Service, ServiceFigures
from migrate.units import NS_PER_MS, NS_PER_S

HEARTBEATS_AFTER: Final = 20
"""Heartbeats (of 200 a second) the guest must give at the destination: it really runs there."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A lab guest's QEMU and our monitor of it; the second monitor is the engine's."""

    guest: Guest
    monitor: QmpClient

    @property
    def engine_qmp(self) -> Path:
        """The monitor's socket that we leave free."""
        return self.guest.paths.qmp[1]


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
        report: The engine's own report, ``None`` natively.
        service: What the heartbeats say of the guest's progress, see ``heartbeat_service``.
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
    report: dict[str, Any] | None = None
    service: Service | None = None


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
    """

    def __init__(self, source: Endpoint, destination: Endpoint, link: NetnsPair) -> None:
        self.resumed = trio.Event()
        self.launched_us: int | None = None
        self._source = source
        self._destination = destination
        self._link = link
        self._engine_pids: list[int] = []
        self._bytes_before = (0, 0)
        self._started_us = self._stopped_us = self._resumed_us = 0
        self._cpu_before_s = self._cpu_after_s = self._start_cpu_s = 0.0

    def count_process(self, pid: int) -> None:
        """Let a process of the engine count for the CPU time."""
        self._engine_pids.append(pid)

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
                    self._start_cpu_s = self._engine_cpu_s()
                    self._cpu_before_s = self._cpu_s()

    async def follow_destination(self, events: EventListener) -> None:
        """Take the moment at which the guest runs at the destination."""
        with contextlib.suppress(QmpInterruptedError):
            event = await events.next()
            self._resumed_us = event.timestamp_us or 0
            self._cpu_after_s = self._cpu_s()
            self.resumed.set()

    async def finish(self, report: dict[str, Any] | None) -> Measurement:
        """Wait until the guest lives at the destination, and add up. The caller sets a deadline.

        Raises:
            GuestError: A figure is missing, or the heartbeats are not those of one running guest.
        """
        await self.resumed.wait()
        destination_console = self._destination.guest.console
        await destination_console.wait_heartbeats(HEARTBEATS_AFTER)
        gap_ns = migration_gap_ns(self._source.guest.console, destination_console)
        status = await queries.query_migrate_settled(self._source.monitor)
        if not 0 < self._started_us <= self._stopped_us <= self._resumed_us:
            raise GuestError(
                "events out of order: expected migrate, STOP, RESUME, got "
                f"{self._started_us}, {self._stopped_us}, {self._resumed_us} µs",
                guest_on=GuestOn.DESTINATION,
            )
        after = await self.read_counters()
        launched_us = self.launched_us or self._started_us
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
            report=report,
            service=self._service(),
        )

    def _service(self) -> Service:
        # Events are stamped by the realtime clock, heartbeats by the monotonic one.
        ahead_ns = time.time_ns() - time.monotonic_ns()
        consoles = self._source.guest.console, self._destination.guest.console
        return heartbeat_service(
            join_heartbeats(*consoles),
            started_ns=self._started_us * 1000 - ahead_ns,
            stopped_ns=self._stopped_us * 1000 - ahead_ns,
            resumed_ns=self._resumed_us * 1000 - ahead_ns,
        )

    def _cpu_s(self) -> float:
        qemus = self._source.guest.cpu_seconds() + self._destination.guest.cpu_seconds()
        return qemus + self._engine_cpu_s()

    def _engine_cpu_s(self) -> float:
        return sum(process_cpu_s(pid) for pid in self._engine_pids)


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
            yield watch
            nursery.cancel_scope.cancel()


def process_cpu_s(pid: int) -> float:
    """Return the CPU time that a process used (user and system, all threads); 0 if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    user_ticks, system_ticks = stat.rpartition(")")[2].split()[11:13]
    return (int(user_ticks) + int(system_ticks)) / os.sysconf("SC_CLK_TCK")
