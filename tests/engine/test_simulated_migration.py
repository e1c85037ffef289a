"""Both commands with a simulated guest, over real TCP and on the host's clock; and who may meet."""

from pathlib import Path
from typing import Any

import pytest
import trio

from migrate.destination import DestinationRun
from migrate.errors import GuestOn, MigrationError, NotConvergedError
from migrate.guests.base import Facts
from migrate.guests.simulated_facts import FACTS_VERSION, simulated_facts
from migrate.hello import compare_machines, reported_commit
from migrate.lab.virtual import VirtualParams, run_virtual
from migrate.params import Compress, DestinationParams, LinkAddress, OutputParams, SourceParams
from migrate.qemu.preflight import Severity
from migrate.report.report import Report
from migrate.runtime import RealRuntime
from migrate.session import Session
from migrate.simulation.profile import Profile, read_profile
from migrate.source import SourceRun
from migrate.transport.channels import LinkListener
from migrate.transport.memory_link import MemoryLinkParams
from proto.link.messages import CommitKind, Hello

Ended = tuple[Report, MigrationError | None]

SMALL: dict[str, Any] = {
    "name": "small",
    "ram": "16MiB",
    "warm_up": "50ms",
    "content": {"random": 0.3, "text": 0.3},
    "vcpus": [{"rate": 2000, "working_set": "1MiB", "locality": "zipf"}],
    "devices": [
        {"kind": "virtio-net", "area": "512KiB", "rate_per_s": 200.0},
        {"kind": "virtio-console", "area": "256KiB"},
    ],
}


class ListeningRuntime(RealRuntime):
    """Says where the destination listens."""

    def __init__(self) -> None:
        super().__init__()
        self.address: LinkAddress | None = None
        self.listening = trio.Event()

    async def listen(self, address: LinkAddress, what: str) -> LinkListener:
        listener = await super().listen(address, what)
        self.address = LinkAddress(*listener.getsockname()[:2])
        self.listening.set()
        return listener


async def migrate(profile: Profile, folder: Path) -> tuple[Ended, Ended]:
    ended: dict[str, Ended] = {}
    runtime = ListeningRuntime()
    destination_params = DestinationParams(
        listen=LinkAddress("127.0.0.1", 0),
        simulate=True,
        run_for_s=0.05,
        state_dir=folder / "dst",
        run_dir=folder,
    )
    quiet = OutputParams(quiet=True)

    async def arrive() -> None:
        session = Session("destination", quiet, runtime)
        ended["destination"] = await DestinationRun(destination_params, session).run()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(arrive)
            await runtime.listening.wait()
            assert runtime.address is not None
            params = SourceParams(
                to=runtime.address, simulate=profile, state_dir=folder / "src"
            )
            ended["source"] = await SourceRun(
                params, Session("source", quiet, RealRuntime())
            ).run()
    return ended["source"], ended["destination"]


@pytest.fixture
def runtime_dir(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_tmp))
    return short_tmp


async def test_a_simulated_guest_moves_through_the_whole_engine(runtime_dir: Path) -> None:
    profile = read_profile(SMALL)
    (source, failed), (destination, not_taken) = await migrate(profile, runtime_dir)
    assert (failed, not_taken) == (None, None)
    for report in (source, destination):
        assert report.status == "completed"
        assert report.guest_on is GuestOn.DESTINATION
        assert report.guest_state == "running"
        assert report.commit == "simulated"
        assert report.integrity.equal
        assert report.ram_bytes == profile.ram_bytes
        assert report.guest_clock_jump_ms is not None
        assert report.guest_clock_jump_ms > 0
    assert (source.source, destination.destination) == ("simulate", "simulate")
    assert source.bytes.total() == source.wire_bytes
    assert source.pages.total() >= profile.ram_bytes // 4096
    assert source.guest_clock_jump_ms == source.downtime_ms


def test_a_guest_that_cannot_converge_ends_where_it_was() -> None:
    vcpu = {"rate": 40_000, "working_set": "8MiB", "locality": "sequential"}
    thrash = read_profile({**SMALL, "vcpus": [vcpu], "devices": []})
    link = MemoryLinkParams(bandwidth_bps=10_000_000, delay_ms=1)
    source, destination = run_virtual(
        thrash, link, VirtualParams(compress=Compress("none")), seed=1
    )
    assert source.error is not None
    assert source.error.code == NotConvergedError.code
    assert "--downtime-limit" in source.error.message
    assert (source.guest_on, source.guest_state) == (GuestOn.SOURCE, "running")
    assert source.total_ms < 30_000
    assert destination.error is not None
    assert "does not converge" in destination.error.message
    assert destination.guest_on is GuestOn.SOURCE


# --- who may meet -------------------------------------------------------------------------------

QEMU: dict[str, Any] = {"machine_type": "pc-q35-7.2"}


def hello(facts: dict[str, Any] | None) -> Hello:
    return Hello(bytes(16), 1, 0, facts, facts_missing="" if facts else "no monitor")


@pytest.mark.parametrize(
    ("source", "destination", "text"),
    [
        (simulated_facts(), QEMU, "start migrate-dst with --simulate"),
        (simulated_facts(), None, "start migrate-dst with --simulate"),
        (QEMU, simulated_facts(), "start migrate-dst with a QEMU"),
        (None, simulated_facts(), "start migrate-dst with a QEMU"),
        (
            {**simulated_facts(), "version": FACTS_VERSION + 1},
            simulated_facts(),
            "another version",
        ),
    ],
)
def test_a_simulated_guest_and_a_qemu_refuse_each_other(
    source: dict[str, Any] | None, destination: dict[str, Any] | None, text: str
) -> None:
    (difference,) = compare_machines(hello(source), Facts(destination))
    assert difference.severity is Severity.ERROR
    assert text in difference.text


def test_two_simulated_sides_take_each_other() -> None:
    assert compare_machines(hello(simulated_facts(ram_bytes=1)), Facts(simulated_facts())) == []


def test_the_report_calls_the_handover_of_a_simulated_guest_by_its_own_name() -> None:
    assert reported_commit(CommitKind.HELD, "simulate") == "simulated"
    assert reported_commit(CommitKind.HELD, "qmp") == "held"
