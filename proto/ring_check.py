"""Compares what a device says of its queues with the rings in guest memory.

The same rules by which QEMU refuses a device's state, or declares the device broken, when it
loads it, and some that it would only trip over later. Here the device, the queue, the values and
the page are named, before the handover. Guest memory comes through a function of the caller's,
who may know all of it, the pages the rings lie in, or nothing.

Source: virtio 1.2, 2.7 and 2.8; QEMU ``hw/virtio/virtio.c`` (virtio_load, virtqueue_get_head).
"""

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proto.virtqueue import EVENT_IDX_FEATURE, VirtioDeviceState, VirtqueueState

DRIVER_OK: Final = 0x04
"""Status bit: the driver has set up its queues."""

ACCESS_PLATFORM_FEATURE: Final = 33
"""The ring addresses go through an IOMMU: they are not guest-physical."""

PAGE_MASK: Final = 0xFFF
INDEX_MASK: Final = 0xFFFF
ADDRESS_END: Final = 1 << 64

DESCRIPTOR_BYTES: Final = 16
EVENT_SUPPRESSION_BYTES: Final = 4
PACKED_AVAIL_FLAG: Final = 1 << 7
PACKED_USED_FLAG: Final = 1 << 15


UNUSED: Final = "the device does not use it"
IOMMU: Final = "its addresses go through an IOMMU"


class Outside(enum.Enum):
    """What a ``RamReader`` answers for bytes of which at least one lies in no RAM."""

    OUTSIDE = "outside of RAM"


OUTSIDE: Final = Outside.OUTSIDE

RamReader: TypeAlias = Callable[[int, int], bytes | Outside | None]
"""Reads guest memory: (guest-physical address, length in bytes) to exactly so many bytes;
``OUTSIDE`` where they are not all in RAM; ``None`` where that or their content is not known.
Never raises; is never asked for bytes beyond the last address."""


@dataclass(frozen=True, slots=True)
class QueueCheck:
    """What became of the check of one queue.

    Attributes:
        device: Name of the device.
        state: The queue, of a split ring with ``used_idx`` and ``in_flight`` from guest memory.
        avail_idx: Index up to which the driver has made requests available; split rings only,
            ``None`` where memory is not known.
        consistent: ``None``: not checked, because memory is not known, or for ``left_out``.
        left_out: Why no rule applies to this queue, empty if one does: ``UNUSED``, ``IOMMU``.
        problem: What is wrong, with device, queue, values and page; empty if nothing is.
        page: Guest-physical address of the page that is at fault or was looked at for it.
    """

    device: str
    state: VirtqueueState
    avail_idx: int | None = None
    consistent: bool | None = None
    problem: str = ""
    page: int | None = None
    left_out: str = ""


class _InconsistentError(Exception):
    """A rule is broken: what, and the address whose page to name."""

    def __init__(self, problem: str, address: int | None = None) -> None:
        super().__init__(problem)
        self.address = address


def ring_extents(queue: VirtqueueState, event_idx: bool) -> tuple[tuple[int, int], ...]:
    """Say where in guest memory a queue lies.

    Args:
        queue: A queue that was set up.
        event_idx: Whether the driver accepted ``EVENT_IDX_FEATURE``.

    Returns:
        Guest-physical address and length in bytes of descriptors, available and used ring (packed:
        of the ring and of both event suppression areas).
    """
    descriptors = (queue.desc, DESCRIPTOR_BYTES * queue.num)
    if queue.packed:
        return (
            descriptors,
            (queue.avail, EVENT_SUPPRESSION_BYTES),
            (queue.used, EVENT_SUPPRESSION_BYTES),
        )
    event = 2 if event_idx else 0
    return (
        descriptors,
        (queue.avail, 4 + 2 * queue.num + event),
        (queue.used, 4 + 8 * queue.num + event),
    )


def check_devices(
    devices: Iterable[VirtioDeviceState], read: RamReader
) -> tuple[QueueCheck, ...]:
    """Check every queue of every device, in order; see ``check_queue``."""
    return tuple(
        check_queue(device, queue, read) for device in devices for queue in device.virtqueues
    )


def check_queue(
    device: VirtioDeviceState, queue: VirtqueueState, read: RamReader
) -> QueueCheck:
    """Check one queue against guest memory.

    A device that does not use its queues (driver not ready, bus mastering off, already broken)
    is not held to any rule but that a ring that was used has an address. Behind an IOMMU the
    addresses say nothing without its tables: such a queue is not checked either.
    """
    check = QueueCheck(device.name, queue)
    try:
        if not queue.desc:
            if queue.last_avail_idx:
                took = f"took {queue.last_avail_idx:#x} requests"
                raise _InconsistentError(f"the ring has no address, but the device {took}")
            return replace(check, left_out=UNUSED)
        if device.has_feature(ACCESS_PLATFORM_FEATURE):
            return replace(check, left_out=IOMMU)
        if not queue.packed:
            check = _with_indices(check, read)
        if not _uses_queues(device):
            return replace(check, left_out=UNUSED)
        return (_packed if queue.packed else _split)(check, device, read)
    except _InconsistentError as wrong:
        where = ""
        page = None
        if wrong.address is not None:
            page = wrong.address & ~PAGE_MASK
            where = f" (guest-physical page {page:#x})"
        problem = f"{device.name} queue {queue.index}: {wrong}{where}"
        return replace(check, consistent=False, problem=problem, page=page)


def _uses_queues(device: VirtioDeviceState) -> bool:
    return bool(device.status & DRIVER_OK) and not device.disabled and not device.broken


def _read(read: RamReader, address: int, length: int) -> bytes | Outside | None:
    if address + length > ADDRESS_END:
        return OUTSIDE
    return read(address, length)


def _index_at(read: RamReader, ring: int) -> int | None:
    """The index of an available or used ring, behind its flags."""
    data = _read(read, ring + 2, 2)
    return int.from_bytes(data, "little") if isinstance(data, bytes) else None


def _with_indices(check: QueueCheck, read: RamReader) -> QueueCheck:
    """Complete a split ring's state from guest memory, as far as that is known."""
    state = check.state
    used_idx = _index_at(read, state.used)
    if used_idx is not None:
        taken = (state.last_avail_idx - used_idx) & INDEX_MASK
        in_flight = taken if taken <= state.num else None
        state = replace(state, used_idx=used_idx, in_flight=in_flight)
    return replace(check, state=state, avail_idx=_index_at(read, state.avail))


def _extents(
    device: VirtioDeviceState, queue: VirtqueueState, read: RamReader
) -> list[bytes | None]:
    """Read all parts of a queue.

    Raises:
        _InconsistentError: One is not in RAM.
    """
    names = (
        ("descriptor ring", "driver area", "device area")
        if queue.packed
        else ("descriptor table", "available ring", "used ring")
    )
    parts: list[bytes | None] = []
    for name, (address, length) in zip(
        names, ring_extents(queue, device.has_feature(EVENT_IDX_FEATURE)), strict=True
    ):
        data = _read(read, address, length)
        if isinstance(data, Outside):
            place = f"{address:#x} to {address + length - 1:#x}"
            raise _InconsistentError(f"its {name} at {place} is not in RAM", address)
        parts.append(data)
    return parts


def _split(check: QueueCheck, device: VirtioDeviceState, read: RamReader) -> QueueCheck:
    queue = check.state
    _, avail, used = _extents(device, queue, read)
    _check_indices(check)
    _check_kept_requests(device, queue)
    if avail is not None and check.avail_idx is not None:
        _check_heads(check, avail)
    if used is not None and queue.used_idx is not None:
        _check_used_ids(queue, used)
    return replace(check, consistent=None if avail is None or used is None else True)


def _check_indices(check: QueueCheck) -> None:
    """The rules that QEMU applies when it loads a device."""
    queue = check.state
    if check.avail_idx is not None:
        waiting = (check.avail_idx - queue.last_avail_idx) & INDEX_MASK
        if waiting > queue.num:
            raise _InconsistentError(
                f"available index {check.avail_idx:#x} in guest memory, but the device has "
                f"taken requests up to {queue.last_avail_idx:#x}: {waiting:#x} would wait in a "
                f"ring of {queue.num}",
                queue.avail,
            )
    if queue.used_idx is not None and queue.in_flight is None:
        in_flight = (queue.last_avail_idx - queue.used_idx) & INDEX_MASK
        raise _InconsistentError(
            f"used index {queue.used_idx:#x} in guest memory, but the device has taken requests "
            f"up to {queue.last_avail_idx:#x}: {in_flight:#x} would be in flight in a ring of "
            f"{queue.num}",
            queue.used,
        )


def _check_kept_requests(device: VirtioDeviceState, queue: VirtqueueState) -> None:
    """What the device keeps in its own state must be in flight in its queue."""
    kept = dict(device.in_flight).get(queue.index, 0)
    if queue.in_flight is not None and kept > queue.in_flight:
        raise _InconsistentError(
            f"the device keeps {kept} requests, but only {queue.in_flight} are in flight",
            queue.used,
        )


def _check_heads(check: QueueCheck, avail: bytes) -> None:
    """Every request that waits must start at a descriptor of the ring."""
    queue = check.state
    assert check.avail_idx is not None
    waiting = (check.avail_idx - queue.last_avail_idx) & INDEX_MASK
    ring: NDArray[np.uint16] = np.frombuffer(avail, "<u2", queue.num, 4)
    slots = ((queue.last_avail_idx + np.arange(waiting)) & INDEX_MASK) % queue.num
    wrong = np.flatnonzero(ring[slots] >= queue.num)
    if wrong.size:
        slot = int(slots[wrong[0]])
        raise _InconsistentError(
            f"entry {slot} of the available ring names descriptor {int(ring[slot]):#x} of "
            f"{queue.num}",
            queue.avail + 4 + 2 * slot,
        )


def _check_used_ids(queue: VirtqueueState, used: bytes) -> None:
    """Every request that was given back must have started at a descriptor of the ring.

    Before the index has gone once around the ring, entries beyond it were never written.
    """
    assert queue.used_idx is not None
    entries: NDArray[np.uint32] = np.frombuffer(used, "<u4", 2 * queue.num, 4)
    ids = entries[::2][: min(queue.used_idx, queue.num)]
    wrong = np.flatnonzero(ids >= queue.num)
    if wrong.size:
        slot = int(wrong[0])
        raise _InconsistentError(
            f"entry {slot} of the used ring names descriptor {int(ids[slot]):#x} of {queue.num}",
            queue.used + 4 + 8 * slot,
        )


def _packed(check: QueueCheck, device: VirtioDeviceState, read: RamReader) -> QueueCheck:
    """Compare a packed ring with the device's next available slot.

    The used half of the state is held to no rule: a vhost-user back-end may report only the
    available half, and then QEMU saves zero for it, or the wrap counter in its 15th bit. QEMU
    checks none of it either.
    """
    queue = check.state
    slot, wrap = queue.last_avail_idx, queue.last_avail_wrap
    if slot >= queue.num:
        raise _InconsistentError(f"next available slot {slot:#x} in a ring of {queue.num}")
    ring, *_ = _extents(device, queue, read)
    if ring is None:
        return check
    at = slot * DESCRIPTOR_BYTES + 14
    flags = int.from_bytes(ring[at : at + 2], "little")
    # Both flags equal to the wrap counter: the device has written a used descriptor there in
    # this round. It cannot have, at a slot that it comes to next.
    if bool(flags & PACKED_AVAIL_FLAG) == bool(flags & PACKED_USED_FLAG) == wrap:
        raise _InconsistentError(
            f"descriptor {slot} is next to be available in round {int(wrap)}, but its flags "
            f"{flags:#06x} say that it is used already",
            queue.desc + slot * DESCRIPTOR_BYTES,
        )
    return replace(check, consistent=True)
