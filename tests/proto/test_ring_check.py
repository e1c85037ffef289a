"""Rings that a driver and a device really produced pass; every broken rule is found and named."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.ring_check import check_devices, check_queue, ring_extents
from proto.virtqueue import VirtioDeviceState, VirtqueueState
from tests.virtio_samples import EVENT_IDX, PACKED, VERSION_1, Memory

NAME = "0000:00:02.0/virtio-net"
DESC, AVAIL, USED = 0x1000, 0x5010, 0x9020
READY = 0xF
ACCESS_PLATFORM = 1 << 33


def device_of(
    *queues: VirtqueueState, status: int = READY, features: int = VERSION_1, **flags: object
) -> VirtioDeviceState:
    device = VirtioDeviceState(NAME, 0, "virtio-net", status, features, queues)
    return replace(device, **flags)  # type: ignore[arg-type]


def split(num: int = 8, last: int = 0) -> VirtqueueState:
    return VirtqueueState(1, num, DESC, AVAIL, USED, last)


@dataclass
class SplitRings:
    """A driver and a device, as simple as the specification allows.

    Attributes:
        start: Index at which both begin, so that short runs cross 65535; the ring is in the state
            of one that went around before.
    """

    num: int
    start: int
    memory: Memory = field(default_factory=Memory)
    free: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = list(range(self.num))
        self.avail = self.last = self.used = self.start
        self._write()

    def step(self, op: int, pick: int) -> None:
        if op == 0 and self.free:
            head = self.free.pop(pick % len(self.free))
            self.memory.put(AVAIL + 4 + 2 * (self.avail % self.num), "H", head)
            self.avail = (self.avail + 1) % 65536
        elif op == 1 and self.last != self.avail:
            at = AVAIL + 4 + 2 * (self.last % self.num)
            self.taken.append(int.from_bytes(self.memory.data[at : at + 2], "little"))
            self.last = (self.last + 1) % 65536
        elif op == 2 and self.taken:
            head = self.taken.pop(pick % len(self.taken))
            self.memory.put(USED + 4 + 8 * (self.used % self.num), "II", head, 99)
            self.used = (self.used + 1) % 65536
            self.free.append(head)
        self._write()

    def _write(self) -> None:
        self.memory.put(AVAIL + 2, "H", self.avail)
        self.memory.put(USED + 2, "H", self.used)


sizes = st.sampled_from([1, 2, 4, 8, 32, 256])
starts = st.sampled_from([0, 1, 65535, 65530, 40000]) | st.integers(0, 65535)


@given(sizes, starts, st.lists(st.tuples(st.integers(0, 2), st.integers(0, 300)), max_size=80))
def test_split_rings_in_use_are_consistent(
    num: int, start: int, ops: list[tuple[int, int]]
) -> None:
    rings = SplitRings(num, start)
    for op, pick in ops:
        rings.step(op, pick)
    check = check_queue(device_of(), split(num, rings.last), rings.memory.read)
    assert (check.problem, check.consistent) == ("", True)
    assert check.avail_idx == rings.avail
    assert check.state == replace(
        split(num, rings.last), used_idx=rings.used, in_flight=len(rings.taken)
    )


def obvious_verdict(
    num: int, last: int, *, avail: int, used: int, heads: list[int], ids: list[int]
) -> bool:
    waiting = 0
    while (last + waiting) % 65536 != avail:
        waiting += 1
    in_flight = 0
    while (used + in_flight) % 65536 != last:
        in_flight += 1
    if waiting > num or in_flight > num:
        return False
    for i in range(waiting):
        if heads[(last + i) % 65536 % num] >= num:
            return False
    return not any(ids[slot] >= num for slot in range(num) if slot < used)


@given(st.data())
def test_the_verdict_on_any_split_ring_is_that_of_a_slow_obvious_model(
    data: st.DataObject,
) -> None:
    num = data.draw(st.sampled_from([1, 2, 3, 8, 16]))
    near = st.integers(-num - 2, num + 2)
    last = data.draw(starts)
    avail = (last + data.draw(near)) % 65536
    used = (last - data.draw(near)) % 65536
    entries = st.lists(st.integers(0, num), min_size=num, max_size=num)
    good = st.lists(st.integers(0, num - 1), min_size=num, max_size=num)
    heads, ids = data.draw(entries | good), data.draw(entries | good)
    memory = Memory()
    memory.put(AVAIL, f"HH{num}H", 0, avail, *heads)
    memory.put(USED, f"HH{2 * num}I", 0, used, *(x for i in ids for x in (i, 7)))
    check = check_queue(device_of(), split(num, last), memory.read)
    assert check.consistent == obvious_verdict(
        num, last, avail=avail, used=used, heads=heads, ids=ids
    )
    assert (check.problem == "") == check.consistent
    assert check.problem == "" or check.problem.startswith(f"{NAME} queue 1: ")


@dataclass
class PackedRing:
    """A driver that lays chains into a packed ring, and a device that answers out of order."""

    num: int
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        self.next = self.last = self.used = (0, True)
        self.room = self.num
        self.offered: list[int] = []
        self.taken: list[int] = []

    def step(self, op: int, pick: int) -> None:
        if op == 0 and self.room:
            length = 1 + pick % self.room
            for _ in range(length):
                slot, wrap = self.next
                self._flags(slot, wrap, not wrap)
                self.next = self._after(self.next, 1)
            self.room -= length
            self.offered.append(length)
        elif op == 1 and self.offered:
            length = self.offered.pop(0)
            self.taken.append(length)
            self.last = self._after(self.last, length)
        elif op == 2 and self.taken:
            length = self.taken.pop(pick % len(self.taken))
            slot, wrap = self.used
            self._flags(slot, wrap, wrap)
            self.used = self._after(self.used, length)
            self.room += length

    def _flags(self, slot: int, avail: bool, used: bool) -> None:
        self.memory.put(DESC + 16 * slot, "QIHH", 0x10000, 64, slot, avail << 7 | used << 15)

    def _after(self, place: tuple[int, bool], length: int) -> tuple[int, bool]:
        slot, wrap = place[0] + length, place[1]
        return (slot, wrap) if slot < self.num else (slot - self.num, not wrap)

    def state(self) -> VirtqueueState:
        return VirtqueueState(
            *(1, self.num, DESC, AVAIL, USED, self.last[0], self.used[0], sum(self.taken)),
            packed=True,
            last_avail_wrap=self.last[1],
            used_wrap=self.used[1],
        )


@given(
    st.sampled_from([1, 2, 3, 7, 16]),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 300)), max_size=80),
)
def test_packed_rings_in_use_are_consistent(num: int, ops: list[tuple[int, int]]) -> None:
    ring = PackedRing(num)
    for op, pick in ops:
        ring.step(op, pick)
        check = check_queue(device_of(features=PACKED), ring.state(), ring.memory.read)
        assert (check.problem, check.consistent) == ("", True)
        assert check.state == ring.state()


def packed(num: int = 8) -> VirtqueueState:
    return VirtqueueState(1, num, DESC, AVAIL, USED, 3, 1, 2, True, True, True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"last_avail_idx": 8}, r"next available slot 0x8 in a ring of 8"),
        ({"desc": 0x3FFF0}, r"descriptor ring at 0x3fff0 to 0x4006f is not in RAM .*0x3f000\)"),
        ({"avail": 1 << 40}, r"driver area at 0x10000000000 to 0x10000000003 is not in RAM"),
        ({"used": 2**64 - 2}, r"device area at 0xfffffffffffffffe to .* is not in RAM"),
    ],
)
def test_what_is_wrong_with_a_packed_ring_is_said(change: dict[str, int], problem: str) -> None:
    queue = replace(packed(), **change)  # type: ignore[arg-type]
    check = check_queue(device_of(features=PACKED), queue, Memory().read)
    assert check.consistent is False
    with pytest.raises(AssertionError, match=f"{NAME} queue 1: .*{problem}"):
        raise AssertionError(check.problem)


@pytest.mark.parametrize(
    "used_half",
    [
        {"used_idx": 0, "used_wrap": False, "in_flight": 0},
        {"used_idx": 0x8003, "used_wrap": True, "in_flight": 0},
        {"used_idx": 9, "in_flight": 9},
    ],
    ids=["avail-half-only", "wrap-in-bit-15", "out-of-range"],
)
def test_a_vhost_user_backends_word_for_the_used_half_is_not_believed(
    used_half: dict[str, int],
) -> None:
    queue = replace(packed(), **used_half)  # type: ignore[arg-type]
    assert check_queue(device_of(features=PACKED), queue, Memory().read).consistent is True


@pytest.mark.parametrize("wrap", [False, True])
def test_a_packed_descriptor_that_is_used_already_is_found(wrap: bool) -> None:
    queue = replace(packed(), last_avail_wrap=wrap, used_wrap=wrap)
    memory = Memory()
    for i in range(8):
        memory.put(DESC + 16 * i + 14, "H", 0 if wrap else 0x8080)
    device = device_of(features=PACKED)
    assert check_queue(device, queue, memory.read).consistent is True
    memory.put(DESC + 16 * 3 + 14, "H", 0x8080 if wrap else 0)
    check = check_queue(device, queue, memory.read)
    assert check.consistent is False
    assert f"descriptor 3 is next to be available in round {int(wrap)}" in check.problem
    assert check.page == DESC


def test_a_packed_ring_in_unknown_memory_is_not_judged() -> None:
    memory = Memory(unknown={1})
    assert check_queue(device_of(features=PACKED), packed(), memory.read).consistent is None


def good_memory() -> Memory:
    memory = Memory()
    memory.put(AVAIL, "HH8H", 0, 5, *range(8))
    memory.put(USED, "HH16I", 0, 2, *range(8), *range(8))
    return memory


@pytest.mark.parametrize(
    ("address", "layout", "value", "problem", "page"),
    [
        (
            *(AVAIL + 2, "H", 12),
            "available index 0xc in guest memory, but the device has taken requests up to 0x3: "
            "0x9 would wait in a ring of 8",
            0x5000,
        ),
        (AVAIL + 2, "H", 2, "0xffff would wait in a ring of 8", 0x5000),
        (
            *(USED + 2, "H", 4),
            "used index 0x4 in guest memory, but the device has taken requests up to 0x3: "
            "0xffff would be in flight in a ring of 8",
            0x9000,
        ),
        (
            *(AVAIL + 4 + 2 * 4, "H", 8),
            "entry 4 of the available ring names descriptor 0x8 of 8",
            0x5000,
        ),
        (
            *(USED + 4 + 8, "I", 0x10000),
            "entry 1 of the used ring names descriptor 0x10000 of 8",
            0x9000,
        ),
    ],
)
def test_what_is_wrong_with_a_split_ring_is_said(
    address: int, layout: str, value: int, problem: str, page: int
) -> None:
    memory = good_memory()
    assert check_queue(device_of(), split(last=3), memory.read).consistent is True
    memory.put(address, layout, value)
    check = check_queue(device_of(), split(last=3), memory.read)
    assert check.consistent is False
    assert check.problem.startswith(f"{NAME} queue 1: ")
    assert problem in check.problem
    assert check.problem.endswith(f" (guest-physical page {page:#x})")
    assert check.page == page


@pytest.mark.parametrize(
    ("waiting", "in_flight", "consistent"),
    [(8, 0, True), (0, 8, True), (8, 8, True), (9, 0, False), (0, 9, False), (0, -1, False)],
)
@pytest.mark.parametrize("last", [0, 3, 65535, 65528])
def test_a_split_ring_holds_as_many_requests_as_it_has_entries(
    waiting: int, in_flight: int, consistent: bool, last: int
) -> None:
    memory = Memory()
    memory.put(AVAIL + 2, "H", (last + waiting) % 65536)
    memory.put(USED + 2, "H", (last - in_flight) % 65536)
    check = check_queue(device_of(), split(last=last), memory.read)
    assert check.consistent is consistent
    assert check.state.in_flight == (in_flight if 0 <= in_flight <= 8 else None)


def test_entries_of_a_ring_of_three_are_numbered_from_the_wrapped_index() -> None:
    # Index 65535 is entry 0, index 0 is entry 0 again.
    memory = Memory()
    memory.put(AVAIL, "HHHHH", 0, 1, 2, 9, 9)
    memory.put(USED + 2, "H", 65535)
    assert check_queue(device_of(), split(3, 65535), memory.read).consistent is True


def test_the_reader_is_never_asked_beyond_the_last_address() -> None:
    asked: list[int] = []

    def read(address: int, length: int) -> bytes:
        asked.append(address + length)
        return bytes(length)

    for at in (2**64 - 1, 2**64 - 4, 2**64 - 20, 2**64 - 200):
        queue = VirtqueueState(0, 8, at, at, at, 0)
        assert (check_queue(device_of(), queue, read).consistent is True) == (at == 2**64 - 200)
    assert max(asked) <= 2**64


@pytest.mark.parametrize(
    ("address", "value"),
    [(AVAIL + 4 + 2 * 2, 8), (AVAIL + 4 + 2 * 5, 8), (USED + 4 + 8 * 2, 8)],
)
def test_entries_that_are_not_in_use_may_hold_anything(address: int, value: int) -> None:
    memory = good_memory()
    memory.put(address, "H", value)
    assert check_queue(device_of(), split(last=3), memory.read).consistent is True


def test_a_wrong_entry_on_a_ring_of_many_pages_names_its_own_page() -> None:
    queue = VirtqueueState(0, 4096, 0x10000, 0x20000, 0x22100, 4000)
    memory = Memory()
    memory.put(0x20000, "HH", 0, 4001)
    memory.put(0x22100, "HH", 0, 4000)
    memory.put(0x20000 + 4 + 2 * 4000, "H", 5000)
    check = check_queue(device_of(), queue, memory.read)
    assert check.page == 0x21000


@pytest.mark.parametrize("ring", ["desc", "avail", "used"])
def test_a_ring_that_is_not_all_in_ram_is_found(ring: str) -> None:
    queue = replace(split(num=256), **{ring: 0x3FFF0})  # type: ignore[arg-type]
    check = check_queue(device_of(), queue, Memory().read)
    assert check.consistent is False
    assert "at 0x3fff0 to 0x4" in check.problem
    assert "is not in RAM (guest-physical page 0x3f000)" in check.problem


@pytest.mark.parametrize("packed_ring", [False, True])
@pytest.mark.parametrize("status", [READY, 0])
def test_a_used_ring_without_address_is_found_whatever_the_state_of_the_device(
    packed_ring: bool, status: int
) -> None:
    queue = VirtqueueState(1, 8, 0, 0, 0, 3, packed=packed_ring)
    check = check_queue(device_of(status=status), queue, Memory().read)
    assert check.consistent is False
    assert "the ring has no address, but the device took 0x3 requests" in check.problem
    unused = replace(queue, last_avail_idx=0)
    assert check_queue(device_of(status=status), unused, Memory().read).consistent is None


@pytest.mark.parametrize(
    "state",
    [{"status": 0xB}, {"disabled": True}, {"broken": True}, {"features": ACCESS_PLATFORM}],
    ids=["not-ready", "disabled", "broken", "iommu"],
)
@pytest.mark.parametrize("queue", [split(last=999), replace(packed(), last_avail_idx=77)])
def test_a_device_that_does_not_use_its_queues_is_not_judged(
    state: dict[str, int], queue: VirtqueueState
) -> None:
    check = check_queue(replace(device_of(), **state), queue, good_memory().read)  # type: ignore[arg-type]
    assert (check.consistent, check.problem) == (None, "")


@pytest.mark.parametrize(
    ("unknown", "avail_idx", "used_idx"),
    [({5}, None, 2), ({9}, 5, None), ({5, 9}, None, None), ({1}, 5, 2)],
)
def test_what_is_not_known_is_not_judged(
    unknown: set[int], avail_idx: int | None, used_idx: int | None
) -> None:
    memory = good_memory()
    memory.unknown = unknown
    check = check_queue(device_of(), split(last=3), memory.read)
    assert (check.avail_idx, check.state.used_idx) == (avail_idx, used_idx)
    assert check.state.in_flight == (None if used_idx is None else 1)
    # The descriptors themselves are not looked at.
    assert check.consistent is (True if unknown == {1} else None)


def test_an_index_alone_can_be_enough_to_find_a_fault() -> None:
    queue = VirtqueueState(1, 4096, 0x10000, 0x20000, 0x30000, 3)
    memory = Memory(unknown={0x21, 0x31})
    memory.put(0x20002, "H", 2)
    check = check_queue(device_of(), queue, memory.read)
    assert check.consistent is False
    assert "available index 0x2" in check.problem
    memory.put(0x20002, "H", 3)
    memory.put(0x30002, "H", 3)
    assert check_queue(device_of(), queue, memory.read).consistent is None


@pytest.mark.parametrize("kept", [1, 2])
def test_requests_that_the_device_keeps_must_be_in_flight(kept: int) -> None:
    device = device_of(in_flight=((0, 5), (1, kept)))
    check = check_queue(device, split(last=3), good_memory().read)
    assert check.consistent is (kept == 1)
    assert (check.problem == "") == (kept == 1)


def test_extents_are_those_of_the_specification() -> None:
    assert ring_extents(split(256), False) == ((DESC, 4096), (AVAIL, 516), (USED, 2052))
    assert ring_extents(split(256), True) == ((DESC, 4096), (AVAIL, 518), (USED, 2054))
    assert ring_extents(packed(256), True) == ((DESC, 4096), (AVAIL, 4), (USED, 4))


def test_event_index_makes_rings_longer() -> None:
    end = 0x40000
    queue = replace(split(), used=end - 4 - 64)
    assert check_queue(device_of(), queue, Memory().read).consistent is True
    assert check_queue(device_of(features=EVENT_IDX), queue, Memory().read).consistent is False


def test_all_queues_of_all_devices_are_checked_in_order() -> None:
    first = device_of(split(last=3), replace(split(last=99), index=2))
    second = replace(device_of(packed(), features=PACKED), name="other")
    checks = check_devices([first, second], good_memory().read)
    assert [(c.device, c.state.index, c.consistent) for c in checks] == [
        (NAME, 1, True),
        (NAME, 2, False),
        ("other", 1, True),
    ]
