"""Virtqueue state: one type for what QEMU's device state says and what a simulated device keeps.

Owns the values a device needs to go on with its queues on another host. Knows nothing of where
they came from (``proto.qemu.virtio`` decodes them, ``migrate.simulation`` lives on them) nor of
guest memory (``proto.ring_check`` compares them with it).

Source: virtio 1.2, 2.6-2.8; QEMU ``hw/virtio/virtio.c`` (virtio_save).
"""

from dataclasses import dataclass
from typing import Final

MAX_QUEUE_SIZE: Final = 32768
"""Largest size of a virtqueue that the specification allows; QEMU stops at 1024."""

MAX_QUEUES: Final = 1024
"""Most queues of one device (QEMU's VIRTIO_QUEUE_MAX)."""

RING_PACKED_FEATURE: Final = 34
"""Feature bit VIRTIO_F_RING_PACKED."""

EVENT_IDX_FEATURE: Final = 29
"""Feature bit VIRTIO_F_RING_EVENT_IDX."""

VERSION_1_FEATURE: Final = 32
"""Feature bit VIRTIO_F_VERSION_1: a modern driver; without it a transitional device is legacy."""


@dataclass(frozen=True, slots=True)
class VirtqueueState:
    """Where a device stands in one of its queues.

    Attributes:
        index: Number of the queue in its device.
        num: Size of the ring in descriptors.
        desc: Guest-physical address of the descriptor table (packed: of the descriptor ring).
        avail: Of the available ring (packed: of the driver's event suppression).
        used: Of the used ring (packed: of the device's event suppression).
        last_avail_idx: Next available entry the device will take: free-running 16-bit index
            for a split ring, a slot of the ring for a packed one.
        used_idx: Next used entry it will write, same units. ``None`` where the device state
            does not say (QEMU reads it back from a split ring in guest memory).
        in_flight: Requests taken and not yet given back; ``None`` where not known.
        packed: Whether it is a packed ring.
        last_avail_wrap: Wrap counter that belongs to ``last_avail_idx``; packed only.
        used_wrap: Wrap counter that belongs to ``used_idx``; packed only.
    """

    index: int
    num: int
    desc: int
    avail: int
    used: int
    last_avail_idx: int
    used_idx: int | None = None
    in_flight: int | None = None
    packed: bool = False
    last_avail_wrap: bool = False
    used_wrap: bool = False


@dataclass(frozen=True, slots=True)
class VirtioDeviceState:
    """The virtio part of one device.

    Attributes:
        name: As the stream names it: bus path and kind, ``0000:00:02.0/virtio-net``.
        instance: Instance of that name, 0 nearly always.
        kind: ``virtio-net``, ``virtio-blk``, …
        status: Device status byte (0xf: driver is ready).
        features: Feature bits the driver accepted.
        virtqueues: Queues that the driver set up, in order of their index.
        started: Whether the back-end runs; ``None`` where the state does not say.
        broken: Whether the device has given up on its driver.
        disabled: Whether it may not touch guest memory (bus mastering off).
        in_flight: Requests kept in the device's own state, by queue index.
    """

    name: str
    instance: int
    kind: str
    status: int
    features: int
    virtqueues: tuple[VirtqueueState, ...]
    started: bool | None = None
    broken: bool = False
    disabled: bool = False
    in_flight: tuple[tuple[int, int], ...] = ()

    def has_feature(self, bit: int) -> bool:
        """Whether the driver accepted a feature bit."""
        return bool(self.features >> bit & 1)
