"""The probe against real UDP services on the loopback: answers, silence, liars, a stop."""

import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from migrate.cli.options import parse_source
from migrate.errors import GuestOn, MigrationError
from migrate.params import LinkAddress, ProbeTarget
from migrate.probe import DATAGRAM, MAGIC, MigrationPhases, Probe, open_probe
from migrate.report.ledger import Ledger
from migrate.report.report import Report, ReportBuilder, Service

Answer = Callable[[bytes], list[bytes]]
RATE_PER_S = 500
SOURCE = ["--to", "host-b:4444", "--qmp", "/run/vm/qmp"]


class Echo:
    """A service on the loopback.

    Attributes:
        port: Where it is.
        stopped: Takes requests from its socket, but answers nothing until it runs again.
        asked: Requests that came so far.
    """

    def __init__(self, sock: trio.socket.SocketType, answer: Answer) -> None:
        self.port: int = sock.getsockname()[1]
        self.stopped = False
        self.asked = 0
        self._sock = sock
        self._answer = answer
        self._held: list[tuple[bytes, tuple[str, int]]] = []

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            data, where = await self._sock.recvfrom(2048)
            self.asked += 1
            self._held.append((data, where))
            if not self.stopped:
                await self.answer_held()

    async def answer_held(self) -> None:
        held, self._held = self._held, []
        for data, where in held:
            for answer in self._answer(data):
                await self._sock.sendto(answer, where)

    async def resume(self) -> None:
        self.stopped = False
        await self.answer_held()


@asynccontextmanager
async def echo(answer: Answer = lambda data: [data]) -> AsyncIterator[Echo]:
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        async with trio.open_nursery() as nursery:
            service = Echo(sock, answer)
            await nursery.start(service.serve)
            yield service
            nursery.cancel_scope.cancel()


class Migration:
    """What the engine would tell the probe."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.stopped_ns: int | None = None
        self.running_ns: int | None = None
        self.warnings: list[str] = []
        self.phases = MigrationPhases(
            self.ledger, lambda: self.stopped_ns, lambda: self.running_ns
        )

    def start_round(self, number: int) -> None:
        self.ledger.start_round(number, time.monotonic_ns())

    def probe(self, port: int) -> contextlib.AbstractAsyncContextManager[Probe]:
        return open_probe(
            ProbeTarget(LinkAddress("127.0.0.1", port), RATE_PER_S), self.warnings.append
        )

    async def finish(self, probe: Probe, *, completed: bool = True) -> Service | None:
        await probe.finish(report := result(completed=completed))
        return report.service


def result(*, completed: bool) -> Report:
    builder = ReportBuilder("source", 0)
    if completed:
        return builder.completed(1, GuestOn.DESTINATION, "running")
    return builder.failed(1, MigrationError("no", guest_on=GuestOn.SOURCE), "running")


async def migrate(migration: Migration, probe: Probe, service: Echo, *, running: bool) -> None:
    """Two rounds, a stop of 0.2 s in which requests pile up."""
    await probe.wait_before(0.2)
    probe.follow(migration.phases)
    for number in (0, 1):
        migration.start_round(number)
        await trio.sleep(0.1)
    service.stopped = True
    migration.stopped_ns = time.monotonic_ns()
    await trio.sleep(0.05)
    migration.start_round(2)  # the last pages, sent while the guest stands still
    await trio.sleep(0.15)
    if running:
        migration.running_ns = time.monotonic_ns()
    await service.resume()


def total(service: Service, key: str) -> float:
    phases = [service.before, *service.rounds.values(), service.downtime, service.after]
    return sum(figures[key] or 0 for figures in phases)


async def test_each_phase_of_a_migration_has_its_figures() -> None:
    migration = Migration()
    async with echo() as service, migration.probe(service.port) as probe:
        await migrate(migration, probe, service, running=True)
        found = await migration.finish(probe)
    assert found is not None
    assert migration.warnings == []
    assert list(found.rounds) == ["0", "1"]
    for figures in (found.before, *found.rounds.values(), found.after):
        assert figures["completed"]
        assert figures["latency_max_ms"]
    # Nothing was lost: what was asked during the stop waited for its end, and longest of all.
    assert total(found, "sent") == total(found, "completed") == service.asked
    assert total(found, "lost") == 0
    assert found.downtime["completed"] == 0
    assert found.downtime["sent"]
    stop_ms = ((migration.running_ns or 0) - (migration.stopped_ns or 0)) / 1e6
    assert found.downtime["duration_ms"] == stop_ms
    assert found.downtime_gap_ms is not None
    assert found.downtime_gap_ms > stop_ms
    assert (found.downtime["latency_max_ms"] or 0) > 100


async def test_a_resume_that_nobody_tells_is_seen_at_the_first_answer() -> None:
    migration = Migration()
    async with echo() as service, migration.probe(service.port) as probe:
        await migrate(migration, probe, service, running=False)
        await trio.sleep(0.1)
        found = await migration.finish(probe, completed=False)
    assert found is not None
    assert found.downtime["sent"]
    assert found.after["completed"]
    assert (found.downtime["latency_max_ms"] or 0) > 100


async def test_a_service_that_never_answers_is_a_warning() -> None:
    migration = Migration()
    async with echo(lambda _: []) as service, migration.probe(service.port) as probe:
        await probe.wait_before(0.05)
        assert await migration.finish(probe, completed=False) is None
    assert migration.warnings == [
        f"no answer from the probed service at udp:127.0.0.1:{service.port}: nothing came back"
    ]


async def test_a_closed_port_is_a_warning() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    migration = Migration()
    async with migration.probe(port) as probe:
        await probe.wait_before(0.05)
        assert await migration.finish(probe, completed=False) is None
    (warning,) = migration.warnings
    assert warning.endswith(f"udp:127.0.0.1:{port}: Connection refused")


async def test_a_name_that_is_unknown_is_a_warning() -> None:
    warnings: list[str] = []
    target = ProbeTarget(LinkAddress("no.such.host.invalid", 7))
    async with open_probe(target, warnings.append) as probe:
        await probe.wait_before(5)
        await probe.finish(result(completed=True))
    assert len(warnings) == 1
    assert (
        warnings[0].startswith(
            "cannot probe the service at udp:no.such.host.invalid:7: Name or service not known"
        )
        or "failure in name resolution" in warnings[0]
    )


async def test_a_service_that_does_not_come_back_is_told() -> None:
    migration = Migration()
    async with echo() as service, migration.probe(service.port) as probe:
        await probe.wait_before(0.05)
        probe.follow(migration.phases)
        migration.start_round(0)
        service.stopped = True
        migration.stopped_ns = time.monotonic_ns()
        await trio.sleep(0.02)
        migration.running_ns = time.monotonic_ns()
        found = await migration.finish(probe)
    assert found is not None
    assert found.after["completed"] == 0
    assert found.after["lost"]
    assert found.downtime_gap_ms is not None
    assert found.downtime_gap_ms > 1000
    assert len(migration.warnings) == 1
    assert "has not answered since the switchover" in migration.warnings[0]


def lie(data: bytes) -> list[bytes]:
    """Answer rightly among everything that is no answer."""
    magic, mark, number = DATAGRAM.unpack(data)
    return [
        b"",
        data[:-1],
        data + b"x",
        bytes(len(data)),
        struct.pack(">8s8sQ", MAGIC, bytes(8), number),
        struct.pack(">8s8sQ", magic, mark, (1 << 64) - 1),
        data,
        data,
    ]


async def test_what_is_no_answer_is_not_counted_and_nothing_twice() -> None:
    migration = Migration()
    async with echo(lie) as service, migration.probe(service.port) as probe:
        await probe.wait_before(0.1)
        found = await migration.finish(probe, completed=False)
    assert found is not None
    assert found.before["completed"] == found.before["sent"] == service.asked > 0
    assert found.before["lost"] == 0


async def test_without_a_target_nothing_happens() -> None:
    warnings: list[str] = []
    async with open_probe(None, warnings.append) as probe:
        assert not probe.active
        await probe.wait_before(1000)
        report = result(completed=True)
        await probe.finish(report)
    assert report.service is None
    assert warnings == []


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("udp:10.0.0.2:7", ProbeTarget(LinkAddress("10.0.0.2", 7), 200)),
        ("udp:[fe80::1]:7,rate=50", ProbeTarget(LinkAddress("fe80::1", 7), 50)),
        ("udp:vm.example:65535,rate=2000", ProbeTarget(LinkAddress("vm.example", 65535), 2000)),
    ],
)
def test_a_target_is_read(text: str, target: ProbeTarget) -> None:
    assert ProbeTarget.parse(text) == target
    assert parse_source([*SOURCE, "--probe", text, "--probe-before", "0s"]).probe == target


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--probe", "10.0.0.2:7"], "expected udp:HOST:PORT[,rate=N], got '10.0.0.2:7'"),
        (["--probe", "tcp:h:7"], "expected udp:HOST:PORT[,rate=N]"),
        (["--probe", "udp:h"], "expected HOST:PORT, got 'h'"),
        (["--probe", "udp:h:0"], "--probe needs the port of the service"),
        (["--probe", "udp:h:7,"], "expected udp:HOST:PORT[,rate=N]"),
        (["--probe", "udp:h:7,rate="], "expected udp:HOST:PORT[,rate=N]"),
        (["--probe", "udp:h:7,size=9"], "expected udp:HOST:PORT[,rate=N]"),
        (["--probe", "udp:h:7,rate=0"], "expected a probe rate from 1 to 2000"),
        (["--probe", "udp:h:7,rate=2001"], "expected a probe rate from 1 to 2000"),
        (["--probe", "udp:h:7,rate=1e3"], "expected udp:HOST:PORT[,rate=N]"),
        (["--probe-before", "61s"], "expected --probe-before from 0s to 60s, got 61.0s"),
    ],
)
def test_a_mistaken_target_is_told(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_source([*SOURCE, *words])
    assert text in capsys.readouterr().err


def test_a_simulated_guest_is_not_probed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_source(["--to", "host-b:4444", "--simulate", "idle", "--probe", "udp:h:7"])
    assert "--probe needs a real guest" in capsys.readouterr().err
