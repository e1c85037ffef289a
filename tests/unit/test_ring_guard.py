"""What the guards do with guests that cannot be asked, lie, or do not answer."""

import contextlib
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import trio

from migrate.errors import QmpInterruptedError, RingsInconsistentError
from migrate.guests.base import DestinationGuest, SourceGuest
from migrate.ring_guard import READ_S, SourceRingGuard, arrived_reports, check_loaded
from migrate.rings import RingLayout
from proto.errors import QemuStreamError
from proto.guest_events import RamBlocks, ZeroRun
from proto.qemu.physical import PhysicalMap
from proto.virtqueue import VirtioDeviceState
from tests.unit.test_rings import BLOCKS, DEVICE, LAYOUT, PHYSICAL, QUEUE, page_run, ring

MOVED = replace(
    DEVICE,
    virtqueues=(replace(QUEUE, desc=0x1000, avail=0x2000, used=0x5000, last_avail_idx=7),),
)


@dataclass
class Guest:
    """A guest of which only rings and memory are asked."""

    devices: tuple[VirtioDeviceState, ...] = (DEVICE,)
    layout: RingLayout | None = LAYOUT
    memory: dict[int, bytes] = field(default_factory=dict)
    error: Exception | None = None
    answers: bool = True
    asked: list[tuple[int, int]] = field(default_factory=list)

    async def ring_layout(self) -> RingLayout | None:
        await trio.lowlevel.checkpoint()
        if isinstance(self.error, QmpInterruptedError):
            raise self.error
        return self.layout

    def virtio_devices(
        self, state: bytes
    ) -> tuple[tuple[VirtioDeviceState, ...], tuple[str, ...]]:
        if isinstance(self.error, QemuStreamError):
            raise self.error
        return self.devices, ()

    async def physical_map(self, blocks: RamBlocks) -> PhysicalMap | None:
        await trio.lowlevel.checkpoint()
        return PHYSICAL if self.layout is not None else None

    async def read_physical(self, address: int, length: int) -> bytes | None:
        await trio.sleep(0 if self.answers else 3600)
        self.asked.append((address, length))
        data = self.memory.get(address)
        return None if data is None else data.ljust(length, b"\0")[:length]

    def as_source(self) -> SourceGuest:
        return self  # type: ignore[return-value]

    def as_destination(self) -> DestinationGuest:
        return self  # type: ignore[return-value]


async def guarded(
    guest: Guest, avail_idx: int, *, allow: bool = False
) -> tuple[SourceRingGuard, list[str]]:
    """A guard that saw rings with this avail index pass, and its warnings."""
    warnings: list[str] = []
    guard = SourceRingGuard(guest.as_source(), allow_inconsistent=allow, warn=warnings.append)
    await guard.start()
    guard.blocks(BLOCKS)
    guard.see(ZeroRun(1, np.arange(64, dtype=np.uint32)))
    guard.see(page_run(36, fill=ring(avail_idx)))
    guard.see(page_run(37, fill=ring(7)))
    guard.take_device_state(b"state")
    return guard, warnings


async def test_good_rings_settle_without_a_question() -> None:
    guest = Guest()
    guard, warnings = await guarded(guest, 8)
    await guard.settle()
    assert guard.all_checked
    assert (guest.asked, warnings) == ([], [])


async def test_a_bad_ring_is_refused_or_warned_of() -> None:
    guard, _ = await guarded(Guest(), 6)
    with pytest.raises(RingsInconsistentError, match="virtio-net queue 0"):
        await guard.settle()
    guard, warnings = await guarded(Guest(), 6, allow=True)
    await guard.settle()
    assert not guard.all_checked
    assert any("virtio-net queue 0" in line for line in warnings)


async def test_a_moved_ring_is_read_from_the_guest() -> None:
    guest = Guest(devices=(MOVED,), memory={0x2000: ring(8), 0x5000: ring(7)})
    guard, _ = await guarded(guest, 8)
    await guard.settle()
    assert guard.all_checked
    assert [address for address, _ in guest.asked] == [0x2000, 0x5000]
    guest = Guest(devices=(MOVED,), memory={0x2000: ring(6), 0x5000: ring(7)})
    guard, _ = await guarded(guest, 8)
    with pytest.raises(RingsInconsistentError):
        await guard.settle()


async def test_rings_too_large_to_be_true_are_not_asked_for() -> None:
    huge = replace(DEVICE, virtqueues=(replace(MOVED.virtqueues[0], num=32768),))
    guest = Guest(devices=(huge,))
    guard, _ = await guarded(guest, 8)
    with contextlib.suppress(RingsInconsistentError):
        await guard.settle()
    assert all(length <= 1 << 16 for _, length in guest.asked)
    assert not guard.all_checked


@pytest.mark.parametrize(
    "error",
    [QmpInterruptedError("the monitor closed"), QemuStreamError("here", "a device", "noise")],
)
async def test_what_cannot_be_found_out_stops_nothing(error: Exception) -> None:
    guard, _ = await guarded(Guest(error=error), 6)
    await guard.settle()
    assert not guard.all_checked


async def test_a_guest_that_does_not_answer_costs_a_bounded_downtime(
    autojump_clock: trio.testing.MockClock,
) -> None:
    guard, _ = await guarded(Guest(devices=(MOVED,), answers=False), 8)
    started = trio.current_time()
    await guard.settle()
    assert trio.current_time() - started == pytest.approx(READ_S)
    assert not guard.all_checked


async def test_a_loaded_guest_is_judged_by_its_own_memory() -> None:
    blocks = RamBlocks(BLOCKS, b"start")
    for avail_idx, good in ((8, True), (6, False)):
        guest = Guest(
            memory={QUEUE.desc: b"", QUEUE.avail: ring(avail_idx), QUEUE.used: ring(7)}
        )
        verdict = await check_loaded(guest.as_destination(), blocks, b"state")
        assert verdict is not None
        assert verdict.all_good is good
    nobody = Guest(layout=None).as_destination()
    assert await check_loaded(nobody, blocks, b"state") is None


def test_devices_that_the_source_checked_are_reported_so() -> None:
    guest = Guest().as_destination()
    for checked in (True, False):
        (device,) = arrived_reports(guest, b"state", checked_by_source=checked)
        assert [queue.consistent for queue in device.virtqueues] == [checked or None]
