"""Fuzzing of virtio: damaged device state and ring pages.

Whatever comes is a typed error, a reported inconsistency, or a well-formed value. Three kinds of
case: one device's state, guest memory and what a device says of it, and a whole tail.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from proto.errors import QemuStreamError
from proto.qemu.virtio import decode_virtio, is_virtio, virtio_devices
from proto.qemu.vmdesc import DeviceSlice, slice_devices
from proto.ring_check import OUTSIDE, Outside, check_devices, check_queue, ring_extents
from proto.virtqueue import MAX_QUEUE_SIZE, MAX_QUEUES, VirtioDeviceState, VirtqueueState
from tests import virtio_samples as vs
from tests.fuzz.mutation import damage
from tests.virtio_samples import Memory, Ring

RECORDED: Final = ("7.2-plain", "7.2-devices", "10.0-plain", "10.0-devices", "10.0-bitmap")
TAIL_EVERY: Final = 8
"""One case in so many is a whole tail: it takes longer than another."""


@dataclass(frozen=True)
class Corpus:
    """What is damaged: devices, and whole tails."""

    devices: tuple[DeviceSlice, ...]
    tails: tuple[bytes, ...]


def corpus() -> Corpus:
    """Recorded tails, and built ones for what the recorded guest does not use."""
    tails = [vs.golden_tail(name) for name in RECORDED]
    tails += [vs.tail_with(built()), vs.tail_with(built()[:3])]
    tails += [tails[-1][: tails[-1].rindex(b"\0\6")] + b"\0"]
    devices = [device for tail in tails for device in slice_devices(tail) if is_virtio(device)]
    return Corpus(tuple(devices), tuple(tails))


def built() -> list[tuple[str, bytes]]:
    """One device of each kind and way."""
    two = (Ring(8, 0x1000, 0x1080, 0x10A0, 3), Ring(8, 0x2000, 0x2080, 0x20A0, 4))
    many = [Ring(128, 0x1000 * i, 0x1000 * i + 2048, 0x1000 * i + 2304, i) for i in range(64)]
    packed = vs.VERSION_1 | vs.PACKED
    offloads = vs.VERSION_1 | vs.GUEST_OFFLOADS
    kept = b"\1\0\0\0\1" + vs.element(3)
    pairs = vs.net_part(3, (4, 3), bytes(8) + vs.rss_part())
    return [
        ("0000:00:01.0/virtio-net", vs.virtio_body(own=vs.net_part())),
        ("0000:00:02.0/virtio-rng", vs.virtio_body(features=0, legacy_device=True)),
        ("0000:00:03.0/virtio-blk", vs.virtio_body(rings=two, own=kept + b"\0")),
        (
            "0000:00:04.0:00.0/virtio-net",
            vs.virtio_body(own=pairs, features=offloads, express=True, vectors=9),
        ),
        (
            "0000:00:05.0/virtio-net",
            vs.virtio_body(own=vs.net_part(), features=packed, packed_device=True),
        ),
        (
            "0000:00:06.0/virtio-console",
            vs.virtio_body(rings=many, own=vs.console_part((None, vs.element(1)))),
        ),
        ("0000:00:07.0/virtio-balloon", vs.virtio_body(own=bytes(8), vectors=None)),
        ("0000:00:08.0/virtio-scsi", vs.virtio_body(flags=("broken", "ringsize"))),
        ("0000:00:09.0/virtio-mem", vs.virtio_body(own=bytes(100), flags=("disabled",))),
    ]


def device_case(rng: random.Random, known: Corpus) -> str:
    """Damage the state of one device; check what it then says against some memory."""
    device = rng.choice(known.devices)
    body = damage(rng, device.body, rng.choice(known.devices).body)
    try:
        state = decode_virtio(replace(device, body=body))
    except QemuStreamError:
        return "device: refused"
    well_formed(state)
    checks = check_devices([state], RandomMemory(rng).read)
    bad = any(check.consistent is False for check in checks)
    return "device: decoded, rings inconsistent" if bad else "device: decoded"


def ring_case(rng: random.Random, _: Corpus) -> str:
    """Damage the memory a queue lies in, or what the device says of the queue."""
    num = rng.choice((1, 2, 8, 64, 256, 1024, 5, MAX_QUEUE_SIZE if rng.random() < 0.01 else 4))
    last, used_idx = rng.randrange(num), rng.randrange(num)
    queue = VirtqueueState(0, num, 0x1000, 0x10000, 0x18000, rng.choice((5, 0, 65535)))
    features = vs.EVENT_IDX | vs.VERSION_1
    if rng.random() < 0.4:
        features |= vs.PACKED
        wraps = (rng.random() < 0.5, rng.random() < 0.5)
        queue = replace(queue, last_avail_idx=last, used_idx=used_idx, packed=True)
        queue = replace(queue, in_flight=rng.randrange(num + 2), last_avail_wrap=wraps[0])
        queue = replace(queue, used_wrap=wraps[1])
    memory = Memory(bytearray(0x20000))
    ahead = rng.choice((0, 1, num, num + 1))
    memory.put(queue.avail + 2, "H", (queue.last_avail_idx + ahead) % 65536)
    memory.put(queue.used + 2, "H", (queue.last_avail_idx - rng.choice((0, 1, num))) % 65536)
    for address, length in ring_extents(queue, event_idx=True):
        size = min(length, 4096)
        page = damage(rng, bytes(memory.data[address : address + size]), b"\xff" * 64)
        memory.data[address : address + size] = page[:size].ljust(size, b"\0")
    if rng.random() < 0.3:
        what = rng.choice(("desc", "avail", "used", "last_avail_idx"))
        limit = 16 if what == "last_avail_idx" else 64
        queue = replace(queue, **{what: rng.choice((0, 0x1F000, rng.getrandbits(limit)))})  # type: ignore[arg-type]
    memory.unknown = {rng.randrange(32) for _ in range(rng.choice((0, 0, 0, 4)))}
    device = VirtioDeviceState("x/virtio-net", 0, "virtio-net", 0xF, features, (queue,))
    check = check_queue(device, queue, memory.read)
    assert (check.consistent is False) == bool(check.problem)
    return {True: "ring: consistent", False: "ring: inconsistent", None: "ring: not judged"}[
        check.consistent
    ]


def tail_case(rng: random.Random, known: Corpus) -> str:
    """Damage a whole tail."""
    tail = damage(rng, rng.choice(known.tails), rng.choice(known.tails))
    try:
        devices, problems = virtio_devices(tail)
    except QemuStreamError:
        return "tail: refused"
    for device in devices:
        well_formed(device)
    return "tail: some devices refused" if problems else "tail: decoded"


def well_formed(device: VirtioDeviceState) -> None:
    """What is promised of everything that is not refused."""
    assert len(device.virtqueues) <= MAX_QUEUES
    for queue in device.virtqueues:
        assert 0 < queue.num <= MAX_QUEUE_SIZE
        assert queue.desc or queue.last_avail_idx
        assert 0 <= queue.last_avail_idx < 65536


class RandomMemory:
    """Guest memory without content of its own: random, unknown or outside."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def read(self, _: int, length: int) -> bytes | Outside | None:
        """Read as a ``RamReader`` does."""
        return self._rng.choice((OUTSIDE, None, *[self._rng.randbytes(length)] * 6))


def virtio() -> Callable[[random.Random], str]:
    """State of one device, memory of one queue, and whole tails."""
    known = corpus()

    def case(rng: random.Random) -> str:
        if rng.randrange(TAIL_EVERY) == 0:
            return tail_case(rng, known)
        return rng.choice((device_case, ring_case))(rng, known)

    return case
