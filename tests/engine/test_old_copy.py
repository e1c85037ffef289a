"""A guest comes back to a host that kept its memory: what is there need not travel, if it is true.

Both commands, on a virtual clock, with real files. A simulated guest ends with its command, so who
comes back is another one of the same profile and seed, which was born with the same memory.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import trio

from migrate.checkpoint import source_side
from migrate.checkpoint.destination_side import DestinationCopies, OldPages
from migrate.checkpoint.file import CheckpointReader
from migrate.checkpoint.params import CheckpointParams
from migrate.checkpoint.store import CheckpointStore
from migrate.destination import DestinationRun
from migrate.errors import GuestOn, PeerProtocolError
from migrate.lab.virtual import (
    Runs,
    VirtualNetwork,
    VirtualParams,
    destination_params,
    migrate_virtually,
    run_on_virtual_clock,
    source_params,
)
from migrate.pages.checkpoint import CheckpointHeader
from migrate.pages.digests import Digests
from migrate.report.report import Report
from migrate.session import Session
from migrate.simulation.profile import read_profile
from migrate.source import SourceRun
from migrate.transport.link import Link
from migrate.transport.memory_link import MemoryLinkParams
from migrate.units import MIB
from proto.guest_events import PAGE_SIZE

PROFILE: Final = read_profile(
    {
        "name": "idle",
        "ram": "16MiB",
        "seed": 7,
        "content": {"random": 0.4, "text": 0.3},
        "vcpus": [{"rate": 100, "working_set": "1MiB", "locality": "zipf"}],
    }
)
VM: Final = "idle-7"
LINK: Final = MemoryLinkParams(bandwidth_bps=25_000_000, delay_ms=1)


@dataclass
class Hosts:
    """Two hosts; only the first keeps anything.

    Attributes:
        directory: Where it does.
    """

    directory: Path
    seed: int = 0

    @property
    def path(self) -> Path:
        return self.directory / f"{VM}.ram"

    def leave(self, **options: Any) -> tuple[Report, Report]:  # noqa: ANN401 - a type per option
        """The guest leaves the first host."""
        kept = {"checkpoint": CheckpointParams(self.directory)}
        return self._migrate({**kept, **options}, {})

    def come_back(self, **options: Any) -> tuple[Report, Report]:  # noqa: ANN401 - as above
        """The guest comes to the first host."""
        vm_id = options.pop("source_vm_id", None)
        kept = {"checkpoint": CheckpointParams(self.directory)}
        return self._migrate({"vm_id": vm_id}, {**kept, **options})

    def _migrate(
        self, source: dict[str, Any], destination: dict[str, Any]
    ) -> tuple[Report, Report]:
        self.seed += 1  # each migration has other digests

        def make_runs(near: Session, far: Session) -> Runs:
            params = VirtualParams(run_for_s=0.01)
            return (
                SourceRun(replace(source_params(params, simulate=PROFILE), **source), near),
                DestinationRun(replace(destination_params(params), **destination), far),
            )

        async def migrate() -> tuple[Report, Report]:
            return await migrate_virtually(make_runs, VirtualNetwork(LINK), self.seed)

        return run_on_virtual_clock(migrate, self.seed)


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    """The guest has left."""
    found = Hosts(tmp_path / "kept")
    source, destination = found.leave()
    assert arrived(source, destination)
    assert source.checkpoint is not None
    assert source.checkpoint.kept
    return found


def arrived(source: Report, destination: Report) -> bool:
    return (
        source.guest_on is destination.guest_on is GuestOn.DESTINATION
        and source.error is destination.error is None
        and source.integrity.equal is destination.integrity.equal is True
        and source.bytes.total() == source.wire_bytes == destination.wire_bytes
    )


def referenced(source: Report, destination: Report) -> int:
    """Pages that were taken from the old copy; 0 also if there was none."""
    assert (source.old_copy is None) == (destination.old_copy is None)
    if source.old_copy is None or destination.old_copy is None:
        return 0
    assert source.old_copy.referenced_pages == destination.old_copy.referenced_pages
    assert source.old_copy.announced_pages == destination.old_copy.announced_pages
    assert source.old_copy.referenced_pages <= source.pages.ref
    return source.old_copy.referenced_pages


def told(report: Report) -> list[str]:
    """Warnings about old copies, and any others but the one about the unprotected link."""
    return [text for text in report.warnings if "without --tls-dir" not in text]


def test_only_what_changed_travels_when_the_guest_comes_back(hosts: Hosts) -> None:
    assert hosts.path.stat().st_mode & 0o777 == 0o600
    first, _ = hosts.leave()
    source, destination = hosts.come_back()
    assert arrived(source, destination)
    assert told(source) == told(destination) == []
    pages = referenced(source, destination)
    assert pages > 0.95 * (first.pages.literal + first.pages.ref)
    assert source.wire_bytes < 0.05 * first.wire_bytes
    assert source.old_copy is not None
    assert destination.old_copy is not None
    assert source.old_copy.saved_bytes == pages * PAGE_SIZE
    assert source.old_copy.age_s is None
    assert destination.old_copy.age_s is not None
    assert first.checkpoint is not None
    assert first.checkpoint.missing_pages == 0
    assert first.checkpoint.path == str(hosts.path)
    assert abs(first.checkpoint.file_bytes - hosts.path.stat().st_blocks * 512) < 128 << 10
    # It stays: the guest may come again, or the migration may have to be repeated.
    assert referenced(*hosts.come_back()) > 0


def test_equal_seeds_give_equal_reports_with_an_old_copy(hosts: Hosts) -> None:
    first = hosts.come_back()
    hosts.seed -= 1
    assert hosts.come_back() == first


def test_host_that_kept_nothing_takes_the_guest_as_always(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path / "kept")
    source, destination = hosts.come_back()
    assert arrived(source, destination)
    assert source.old_copy is destination.old_copy is None
    assert told(source) == told(destination) == []


# --- what is stale, foreign or damaged costs bytes ---------------------------------------------


def edit(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def header_of(path: Path) -> CheckpointHeader:
    store = CheckpointStore(path.parent, MIB)
    file = store.open(VM)
    assert file is not None
    return CheckpointReader(file, 1).header


def every_page_is_another(path: Path) -> None:
    header = header_of(path)
    for page in range(header.page_count):
        edit(path, header.pages_at + page * PAGE_SIZE, page.to_bytes(8) * 512)


def half_is_cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def only_the_header_is_left(path: Path) -> None:
    os.truncate(path, header_of(path).pages_at)


def nothing_is_left(path: Path) -> None:
    os.truncate(path, 0)


def header_is_damaged(path: Path) -> None:
    edit(path, 60, b"\xff")


def presence_is_damaged(path: Path) -> None:
    header = header_of(path)
    edit(path, header.bitmap_at, os.urandom(header.bitmap_bytes))


def it_is_of_another_vm(path: Path) -> None:
    header = replace(header_of(path), vm_id="idle-8")
    edit(path, 0, header.encode())


def it_is_another_file(path: Path) -> None:
    path.write_bytes(b"#!/bin/sh\n")


def it_is_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def it_is_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("happens", "used", "warning"),
    [
        (every_page_is_another, False, None),
        (half_is_cut, True, "not complete: it ends early"),
        (only_the_header_is_left, False, "is not used: no page is left of it"),
        (nothing_is_left, False, "is not used: checkpoint: expected 48 bytes of header"),
        (header_is_damaged, False, "is not used: checkpoint: expected a header with CRC"),
        (presence_is_damaged, True, None),
        (it_is_of_another_vm, False, "expected one of VM idle-7, got one of idle-8"),
        (it_is_another_file, False, "is not used: checkpoint"),
        (it_is_a_link, False, "is not used: Too many levels of symbolic links"),
        (it_is_a_fifo, False, "is not used: no plain file of ours"),
    ],
)
def test_damaged_or_foreign_old_copy_costs_bytes_only(
    hosts: Hosts, happens: Callable[[Path], None], used: bool, warning: str | None
) -> None:
    happens(hosts.path)
    source, destination = hosts.come_back()
    assert arrived(source, destination)
    assert (referenced(source, destination) > 0) == used
    assert len(told(destination)) == (warning is not None)
    if warning is not None:
        assert warning in told(destination)[0]


@pytest.mark.parametrize(
    ("source_vm_id", "vm_id"), [("other", None), ("other", VM), (None, "other")]
)
def test_old_copy_of_one_vm_is_never_used_for_another(
    hosts: Hosts, source_vm_id: str | None, vm_id: str | None
) -> None:
    source, destination = hosts.come_back(source_vm_id=source_vm_id, vm_id=vm_id)
    assert arrived(source, destination)
    assert source.old_copy is destination.old_copy is None
    if vm_id is not None:  # otherwise the source's word counts, and there is nothing of that VM
        assert "no old copy is used" in told(destination)[0]


def test_page_that_changes_after_the_announcement_ends_the_migration_and_the_old_copy(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce = DestinationCopies.announce

    async def announce_and_change(
        self: DestinationCopies, link: Link, welcomed: trio.Event
    ) -> None:
        await announce(self, link, welcomed)
        every_page_is_another(hosts.path)

    with monkeypatch.context() as patch:
        patch.setattr(DestinationCopies, "announce", announce_and_change)
        source, destination = hosts.come_back()
    assert source.guest_on is GuestOn.SOURCE
    assert source.guest_state == "running"
    assert destination.error is not None
    assert destination.error.code == "old-copy"
    assert str(hosts.path) in destination.error.message
    assert source.error is not None
    assert str(hosts.path) in source.error.message
    assert not hosts.path.exists()
    source, destination = hosts.come_back()
    assert arrived(source, destination)
    assert source.old_copy is None


# --- disks and links that are slow or fail -----------------------------------------------------


def test_source_that_does_not_wait_uses_what_it_hears_later(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_side, "WAIT_S", 0.0)
    monkeypatch.setattr("migrate.checkpoint.destination_side.PIECE_PAGES", 300)
    late: list[int] = []

    async def slowly(self: DestinationCopies, link: Link, digests: Digests, last: bool) -> None:
        late.append(len(digests))
        await trio.sleep(0.05)
        await announce_one(self, link, digests, last)

    announce_one = DestinationCopies._announce
    monkeypatch.setattr(DestinationCopies, "_announce", slowly)
    source, destination = hosts.come_back()
    assert arrived(source, destination)
    assert len(late) > 3
    assert 0 < referenced(source, destination) < sum(late)


def test_disk_that_fails_under_the_announcement_ends_it(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrate.checkpoint.destination_side.PIECE_PAGES", 500)
    read_digests = CheckpointReader.read_digests

    def fail_later(self: CheckpointReader, page_count: int) -> Digests:
        if self.index.count:
            raise OSError(5, "Input/output error")
        return read_digests(self, page_count)

    monkeypatch.setattr(CheckpointReader, "read_digests", fail_later)
    source, destination = hosts.come_back()
    assert arrived(source, destination)
    assert 0 < referenced(source, destination) < 600
    assert told(destination) == [
        f"the old copy {hosts.path} is not complete: Input/output error"
    ]


def test_failed_migration_keeps_nothing_and_changes_nothing(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hosts.path.read_bytes()

    def refuse(*_: object) -> None:
        raise PeerProtocolError("no")

    with monkeypatch.context() as patch:
        patch.setattr("migrate.handover.DestinationHandover.hand_over", refuse)
        source, _ = hosts.leave()
    assert source.guest_on is GuestOn.SOURCE
    assert source.checkpoint is not None
    assert not source.checkpoint.kept
    assert sorted(path.name for path in hosts.directory.iterdir()) == [f"{VM}.ram", "lock"]
    assert hosts.path.read_bytes() == before


def test_checkpoint_that_would_be_too_large_is_a_warning(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path / "kept")
    source, destination = hosts.leave(checkpoint=CheckpointParams(hosts.directory, 2 * MIB))
    assert arrived(source, destination)
    assert told(source) == [
        f"no checkpoint of {VM} is kept: it would take up more than --checkpoint-max"
    ]
    assert sorted(path.name for path in hosts.directory.iterdir()) == ["lock"]


@pytest.mark.parametrize("side", ["leave", "come_back"])
def test_directory_that_cannot_be_used_ends_the_command_at_once(
    tmp_path: Path, side: str
) -> None:
    tmp_path.chmod(0o755)
    hosts = Hosts(tmp_path)
    report = getattr(hosts, side)()[side == "come_back"]
    assert report.error.code == "bad-option"
    assert "mode 755" in report.error.message


# --- a peer that lies ---------------------------------------------------------------------------


def test_source_that_refers_to_what_was_not_announced_is_refused(hosts: Hosts) -> None:
    file = CheckpointStore(hosts.directory, MIB).open(VM)
    assert file is not None
    reader = CheckpointReader(file, 1)
    reader.read_digests(100)
    pages = OldPages(reader, hosts.path, lambda: None)
    pages.announced_pages = 5
    out = np.empty((1, PAGE_SIZE), np.uint8)
    pages.read_into(np.array([4], np.uint32), out)
    with pytest.raises(PeerProtocolError, match="old page 5, and 5 were announced"):
        pages.read_into(np.array([5], np.uint32), out)
    assert hosts.path.exists()
