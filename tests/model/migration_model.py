"""One guest's life on one host after another, and what must be true of it wherever it arrives.

The guest, its devices and their dirty tracking are the engine's, and so is the migration
(``tests.model.one_move``); a test decides when time passes and where the stop falls. The model
beside it is as plain as can be: a dict of bytes for the pages that the test writes itself, a copy
of memory at the stop, and a list of what clients saw answered.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from migrate.guests.simulated_facts import simulated_virtio
from migrate.pages.digests import digest_pages
from migrate.simulation.guest import SimulatedGuest
from migrate.simulation.profile import Profile
from migrate.simulation.ram import Pages, SimulatedRam
from migrate.units import NS_PER_MS
from proto.guest_events import PAGE_SIZE
from proto.ring_check import OUTSIDE, Outside, check_devices
from tests.model.kept_ram import Fate, KeptRam
from tests.model.one_move import Move, MoveParams
from tests.simulated import FakeTime

SCRATCH_PAGES: Final = 48
"""The last pages of memory: no vCPU, device or balloon of the profile touches them."""

BALLOON_PAGES: Final = 80
"""The pages before them: what a balloon device may take."""

DRAIN_STEP_NS: Final = 5 * NS_PER_MS
MAX_DRAIN_STEPS: Final = 400

Who = Literal["vcpu", "vcpus", "device"]
Way = Literal["arrives", "stopped", "sent", "verified", "loaded"]
"""How a stop ends: the guest goes on at the destination, or it fails that far and goes on here."""


@dataclass(frozen=True, slots=True)
class Copy:
    """All memory at one instant; ballooned pages read as zero.

    Attributes:
        data: The bytes.
        ballooned: The pages that a balloon has taken.
    """

    data: bytes
    ballooned: tuple[int, ...]

    @classmethod
    def of(cls, ram: SimulatedRam) -> "Copy":
        """Copy it."""
        rows = ram.rows(np.arange(ram.page_count, dtype=np.uint32))
        return cls(rows.tobytes(), tuple(ram.ballooned_pages().tolist()))

    def differing_pages(self, other: "Copy") -> list[int]:
        """Pages that are not the same in both."""
        pages = range(0, len(self.data), PAGE_SIZE)
        return [
            at // PAGE_SIZE
            for at in pages
            if self.data[at : at + PAGE_SIZE] != other.data[at : at + PAGE_SIZE]
        ]


def check_memory(arrived: SimulatedRam, left: Copy) -> None:
    """What arrived is what left, byte for byte."""
    here = Copy.of(arrived)
    assert here.ballooned == left.ballooned
    assert here == left, f"pages {here.differing_pages(left)}"


def check_kept(kept: KeptRam, left: Copy) -> None:
    """What a host kept of a guest is what left, but for pages that a balloon had taken."""
    pages = np.arange(kept.header.page_count, dtype=np.uint32)
    here = kept.rows(np.delete(pages, left.ballooned))
    there = np.frombuffer(left.data, np.uint8).reshape(-1, PAGE_SIZE)
    assert (here == np.delete(there, left.ballooned, axis=0)).all()


def check_rings(source: SimulatedGuest, arrived: SimulatedGuest) -> None:
    """Both sides say the same of every queue, and it agrees with the memory that arrived."""
    devices = simulated_virtio(arrived)
    assert devices == simulated_virtio(source)

    def read(address: int, length: int) -> bytes | Outside:
        if address + length > arrived.ram.length_bytes:
            return OUTSIDE
        return arrived.ram.view_cpu.read(address, length)

    checks = check_devices(devices, read)
    assert len(checks) == sum(len(device.virtqueues) for device in devices)
    for check in checks:
        assert check.consistent, check.problem


BAD: Final = (
    "ring_errors", "rx_damaged", "tx_damaged", "control_errors", "unexpected_answers",
    "io_errors", "damaged", "order_errors", "stray", "foreign_writes", "bad_pages",
)  # fmt: skip
"""Counters of every device's that must stay at nought."""


def statistics(device: Any) -> dict[str, int]:  # noqa: ANN401 - virtio or emulated
    """What a device counted, wherever it was."""
    found: dict[str, int] = device.statistics()
    return found


def drain(device: Any) -> None:  # noqa: ANN401 - virtio or emulated
    """Have a device's load begin nothing new."""
    device.drain()


def last_wish(profile: Profile) -> tuple[float, int]:
    """Return when the host says for the last time what its balloon shall hold, and how much.

    Draining does not end a schedule: between two wishes a balloon is only quiet.

    Returns:
        Milliseconds since power-on, and pages; nought and nought without wishes.
    """
    wishes = [wish for spec in profile.devices for wish in spec.options.get("targets", ())]
    at_ms, pages = max(wishes, default=(0, 0))
    return at_ms, pages


def settled(device: Any) -> bool:  # noqa: ANN401 - virtio or emulated
    """Whether nothing is under way any more, if nothing new is asked for."""
    counts = statistics(device)
    lines = counts.get("lines_written", 0) + counts.get("lines_typed", 0)
    seen = counts.get("lines_seen", 0) + counts.get("lines_got", 0)
    wanted = min(counts.get("target_pages", 0), BALLOON_PAGES)
    return (
        counts.get("requests_outstanding", 0) == 0
        and lines == seen
        and counts.get("actual_pages", 0) == wanted
    )


def judge(
    device: Any,  # noqa: ANN401 - virtio or emulated
    counts: dict[str, int],
    guest: SimulatedGuest,
    *,
    resumes: int,
    arrivals: int,
) -> None:
    """A drained device: nothing lost, nothing twice, in the order that was promised."""
    assert settled(device), (device.name, counts)
    assert {key: counts[key] for key in BAD if counts.get(key)} == {}, device.name
    if "requests_sent" in counts:
        assert counts["requests_sent"] == counts["requests_completed"]
    if "rx_packets" in counts:
        assert counts["rx_packets"] == counts["tx_packets"] == counts["requests_completed"]
        assert counts["requests_resent"] == counts["rx_dropped"]
        assert counts.get("announcements", 0) <= arrivals <= resumes
    if "flushes" in counts:
        kinds = counts["reads"] + counts["writes"] + counts["flushes"]
        assert kinds == counts["requests_completed"]
    if "actual_pages" in counts:
        assert counts["target_pages"] == last_wish(guest.profile)[1]
        end = guest.ram.page_count - SCRATCH_PAGES
        in_balloon = pages_between(guest.ram.ballooned_pages(), end - BALLOON_PAGES, end)
        assert counts["actual_pages"] == len(in_balloon)
        assert counts["inflated"] - counts["deflated"] == len(in_balloon)


def pages_between(pages: Pages, first: int, end: int) -> NDArray[np.uint32]:
    """Those of ``pages`` that are at least ``first`` and below ``end``."""
    return pages[(pages >= first) & (pages < end)]


class Life:
    """A guest's life, from power-on to the last request.

    Attributes:
        guest: The guest, wherever it is.
        move: The migration under way, if any.
        arrivals: How often it arrived elsewhere.
        resumes: How often it went on after a stop.
        classes: Pages by class, in all migrations that were verified.
        kept: Its memory as it was when it last left a host.
    """

    def __init__(self, profile: Profile, *, track_dma: bool = True) -> None:
        self.profile = profile
        self._track_dma = track_dma
        self._time = FakeTime()
        self._done: list[tuple[int, int]] = []
        self._done_elsewhere: list[tuple[int, int]] = []
        self._behind_ns = 0
        self.arrivals = self.resumes = 0
        self.classes = Counter[str]()
        self.move: Move | None = None
        self.kept: KeptRam | None = None
        self.guest = SimulatedGuest(
            profile,
            now_ns=self._time.now_ns,
            wall_ns=self._time.wall_ns,
            completed=lambda *when: self._done.append(when),
            track_dma=track_dma,
        )
        self.guest.power_on()
        first = self.guest.ram.page_count - SCRATCH_PAGES
        rows = self.guest.ram.rows(np.arange(first, first + SCRATCH_PAGES, dtype=np.uint32))
        self._plain: dict[int, bytearray | None] = {
            first + at: bytearray(row.tobytes()) for at, row in enumerate(rows)
        }
        self._first = first

    # --- what happens ---------------------------------------------------------------------------

    def live(self, duration_ns: int) -> None:
        """Let time pass."""
        self._time.pass_ns(duration_ns)
        self.guest.run_until(self.guest.clock.read_ns())

    def write(self, who: Who, page: int, offset: int, data: bytes) -> None:
        """Write anywhere in the scratch pages, across their borders, too.

        Args:
            who: A vCPU through its view, vCPUs many words at once, or a device.
            page: Counted from the first scratch page.
            offset: In the page.
            data: What; ``vcpus`` write whole words, the same to each of three pages.
        """
        ram = self.guest.ram
        if who == "vcpus":
            pages = np.arange(3, dtype=np.uint32) + min(page, SCRATCH_PAGES - 3)
            word = offset % (PAGE_SIZE - 8) // 8
            words = np.frombuffer(data[:8].ljust(8, b"\1"), np.uint64).reshape(1, 1)
            at = np.full(3, word, np.int64)
            ram.write_words(pages + np.uint32(self._first), at, words.repeat(3, axis=0))
            for number in pages.tolist():
                self._write_plain(number * PAGE_SIZE + word * 8, words.tobytes())
            return
        start = page * PAGE_SIZE + offset
        data = data[: SCRATCH_PAGES * PAGE_SIZE - start]
        view = ram.view_dma if who == "device" else ram.view_cpu
        view.write(self._first * PAGE_SIZE + start, data)
        self._write_plain(start, data)

    def _write_plain(self, start: int, data: bytes) -> None:
        for at, byte in enumerate(data, start):
            number = self._first + at // PAGE_SIZE
            content = self._plain[number]
            if content is None:
                content = self._plain[number] = bytearray(PAGE_SIZE)
            content[at % PAGE_SIZE] = byte

    def take_pages(self, page: int, count: int) -> None:
        """Have the host take scratch pages."""
        count = min(count, SCRATCH_PAGES - page)
        self.guest.ram.view_dma.discard(self._first + page, count)
        for number in range(self._first + page, self._first + page + count):
            self._plain[number] = None

    def give_back(self, page: int, count: int) -> None:
        """Give scratch pages back to the guest; those that it has keep their content."""
        count = min(count, SCRATCH_PAGES - page)
        self.guest.ram.view_dma.restore(self._first + page, count)
        for number in range(self._first + page, self._first + page + count):
            if self._plain[number] is None:
                self._plain[number] = bytearray(PAGE_SIZE)

    def begin_move(self, params: MoveParams) -> Move:
        """Begin to migrate, with nothing kept of an earlier try."""
        old_copy = self.kept if params.old_copy else None
        self.move = Move(self.guest, params, track_dma=self._track_dma, old_copy=old_copy)
        return self.move

    def damage_kept(self, fate: Fate, at: float) -> None:
        """Let something happen to what a host kept of the guest."""
        if self.kept is not None:
            self.kept.suffer(fate, at)

    def break_link(self, cut_at: float) -> None:
        """Lose the link: the guest goes on here, the copy is worth nothing."""
        assert self.move is not None
        self.move.break_link(cut_at)
        self.move = None

    def stop(self, way: Way, gap_ns: int) -> None:
        """Stop the guest, and go on ``gap_ns`` later, at the destination if all goes well."""
        move = self.move
        assert move is not None
        self.move = None
        move.stop()
        stopped_ns = self.guest.clock.read_ns()
        memory = Copy.of(self.guest.ram)
        arrived = self._hand_over(move, way, memory)
        self._time.pass_ns(gap_ns)
        if arrived is None:
            # What the other side got so far changes nothing here.
            assert Copy.of(self.guest.ram) == memory
        else:
            assert self.guest.queue.next_ns is None
            self.guest = arrived
            self.arrivals += 1
            self.kept = move.kept.finish()
            check_kept(self.kept, memory)
        self._resume(stopped_ns, gap_ns)

    def _hand_over(self, move: Move, way: Way, memory: Copy) -> SimulatedGuest | None:
        if way == "stopped":
            return None
        state = move.send_rest()
        if way == "sent":
            return None
        move.deliver()
        move.verify()
        self.classes.update(move.classes)
        if way == "verified":
            return None
        completed = self._done if way == "arrives" else self._done_elsewhere
        arrived = move.load(self._time, lambda *when: completed.append(when))
        self._check_arrival(move, arrived, state, memory)
        if way == "loaded":
            return None
        move.commit()
        return arrived

    def _resume(self, stopped_ns: int, gap_ns: int) -> None:
        clock = self.guest.clock
        assert clock.read_ns() == stopped_ns == self.guest.queue.now_ns
        before = len(self._done)
        self.guest.resume()
        self.resumes += 1
        self._behind_ns += gap_ns
        assert (clock.jump_ns, clock.behind_ns) == (gap_ns, self._behind_ns)
        assert clock.read_ns() == stopped_ns
        assert len(self._done) == before

    # --- what must be true -----------------------------------------------------------------------

    def check_plain(self) -> None:
        """The scratch pages hold what was written to them, wherever the guest is."""
        ram = self.guest.ram
        ballooned = set(ram.ballooned_pages().tolist())
        rows = ram.rows(np.arange(self._first, ram.page_count, dtype=np.uint32))
        for (page, content), row in zip(self._plain.items(), rows, strict=True):
            assert (page in ballooned) == (content is None), f"page {page}"
            assert row.tobytes() == (content or bytes(PAGE_SIZE)), f"page {page}"

    def _check_arrival(
        self,
        move: Move,
        arrived: SimulatedGuest,
        state: bytes,
        memory: Copy,
    ) -> None:
        assert Copy.of(self.guest.ram) == memory  # the stopped guest did not change
        check_memory(arrived.ram, memory)
        present = arrived.ram.present_pages()
        table = move.applier.table.get(0, present)
        digests = digest_pages(arrived.ram.rows(present), move.params.digest_seed)
        assert (digests == table).all()
        check_rings(self.guest, arrived)
        assert arrived.save() == state
        assert len(arrived.harvest()) == 0

    def finish(self) -> None:
        """Drain all devices where the guest is now; then nothing may be lost or done twice."""
        self.move = None
        for device in self.guest.devices:
            drain(device)
        wished_ns = int(last_wish(self.profile)[0] * NS_PER_MS)
        self.live(max(0, wished_ns - self.guest.queue.now_ns))
        for _ in range(MAX_DRAIN_STEPS):
            self.live(DRAIN_STEP_NS)
            if all(settled(device) for device in self.guest.devices):
                break
        self.live(DRAIN_STEP_NS)
        self.check_plain()
        counts = [statistics(device) for device in self.guest.devices]
        for device, found in zip(self.guest.devices, counts, strict=True):
            judge(device, found, self.guest, resumes=self.resumes, arrivals=self.arrivals)
        assert len(self._done) == sum(found.get("requests_sent", 0) for found in counts)
        assert all(sent_ns <= done_ns for sent_ns, done_ns in self._done)
        assert self._done_elsewhere == []
        if not self.guest.devices:
            self._compare_with_one_that_stayed()

    def _compare_with_one_that_stayed(self) -> None:
        """Without devices memory is a function of guest time, but for what the test wrote."""
        stayed = SimulatedGuest(self.profile)
        stayed.power_on()
        stayed.run_until(self.guest.queue.now_ns)
        different = self.guest.ram.differing_pages(stayed.ram)
        assert set(different.tolist()) <= set(self._plain)
