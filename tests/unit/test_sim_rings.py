"""Rings of the simulated guest: what each half writes, believes, refuses, and carries along."""

import random
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import ParamsError
from migrate.simulation.virtio.layout import (
    INDIRECT,
    NEXT,
    WRITE,
    Area,
    RingPlace,
    crossed,
    u16_delta,
)
from migrate.simulation.virtio.packed_ring import AVAIL, USED
from proto.errors import MessageError
from tests.unit.sim_parts import through_msgpack
from tests.unit.sim_ring_pair import BUFFERS_AT, RAM_BYTES, Ring

both = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def test_parts_lie_where_the_specification_wants_them() -> None:
    area = Area((4096, 1 << 20))
    first, second = area.ring(256, packed=False), area.ring(3, packed=True)
    assert first.desc % 16 == 0
    assert first.avail % 2 == 0
    assert first.used % 4 == 0
    assert first.avail >= first.desc + 16 * 256
    assert first.used >= first.avail + 6 + 2 * 256
    assert second.desc % 16 == second.avail % 4 == second.used % 4 == 0
    assert second.desc >= first.used + 6 + 8 * 256


@pytest.mark.parametrize(("num", "packed"), [(0, False), (6, False), (65536, False), (0, True)])
def test_impossible_sizes_are_refused(num: int, packed: bool) -> None:
    with pytest.raises(ParamsError, match="queue size"):
        RingPlace(num, 0, 0, 0, packed=packed)


def test_an_area_says_how_much_it_would_need() -> None:
    with pytest.raises(ParamsError, match="need at least 4614"):
        Area((0, 4096)).ring(256, packed=False)


@pytest.mark.parametrize(
    ("event", "new", "old", "notify"),
    [
        (5, 6, 5, True),
        (5, 5, 4, False),
        (5, 7, 6, False),
        (5, 9, 3, True),
        (65535, 0, 65535, True),
        (0, 1, 65535, True),
        (65535, 2, 0, False),
        (7, 7, 7, False),
    ],
)
def test_an_event_is_worth_a_notification_when_it_is_passed(
    event: int, new: int, old: int, notify: bool
) -> None:
    assert crossed(event, new, old) is notify
    assert u16_delta(new, old) == (new - old) % 65536


def test_a_split_chain_is_laid_out_as_the_specification_says() -> None:
    ring = Ring(packed=False, indirect=False)
    ring.add(7, out=2, into=1)
    ring.driver.publish()
    base = BUFFERS_AT + 64 * 7
    assert ring.descriptor(0) == (base, 1, NEXT, 1)
    assert ring.descriptor(1) == (base + 1, 2, NEXT, 2)
    assert ring.descriptor(2) == (base + 32, 1, WRITE, 0)
    assert (ring.u16(ring.place.avail + 2), ring.u16(ring.place.avail + 4)) == (1, 0)
    (element,) = ring.device.pop()
    ring.device.push(element.head, 3)
    ring.device.flush()
    assert struct.unpack_from("<HHII", ring.ram.data, ring.place.used) == (0, 1, 0, 3)


def test_a_packed_chain_is_laid_out_as_the_specification_says() -> None:
    ring = Ring(packed=True, indirect=False, num=4)
    ring.add(7, out=2, into=1)
    ring.driver.publish()
    base = BUFFERS_AT + 64 * 7
    assert ring.descriptor(0) == (base, 1, 0, NEXT | AVAIL)
    assert ring.descriptor(1) == (base + 1, 2, 0, NEXT | AVAIL)
    assert ring.descriptor(2) == (base + 32, 1, 0, WRITE | AVAIL)
    (element,) = ring.device.pop()
    ring.device.push(element.head, 3)
    assert ring.descriptor(0) == (0, 3, 0, WRITE | AVAIL | USED)
    assert ring.driver.take_used() == [(7, 3)]
    ring.add(8, out=2)  # slot 3 in the first round, slot 0 in the second
    ring.driver.publish()
    assert ring.descriptor(3)[3] == NEXT | AVAIL
    assert ring.descriptor(0)[3] == USED


@both
def test_an_indirect_table_takes_one_slot(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.add(1, out=2, into=2)
    ring.driver.publish()
    _, length, *rest = ring.descriptor(0)
    assert length == 4 * 16
    assert rest == ([0, INDIRECT | AVAIL] if packed else [INDIRECT, 0])
    (element,) = ring.device.pop()
    assert element.slots == 1
    assert [length for _, length in element.readable + element.writable] == [1, 2, 1, 2]


@both
def test_a_batch_becomes_visible_as_a_whole(packed: bool) -> None:
    ring = Ring(packed=packed, num=4, indirect=False)
    for lap in range(5):
        for token in range(3):
            ring.add(10 * lap + token)
            assert ring.device.pop() == []
        ring.driver.publish()
        taken = ring.device.pop()
        assert len(taken) == 3
        for element in taken:
            ring.device.push(element.head, 0)
        if not packed:
            assert ring.driver.take_used() == []
        ring.device.flush()
        assert ring.driver.take_used() == [(10 * lap + token, 0) for token in range(3)]


@both
@pytest.mark.parametrize("event_idx", [False, True])
def test_notifications_come_when_asked_for_and_only_then(packed: bool, event_idx: bool) -> None:
    ring = Ring(packed=packed, event_idx=event_idx, num=16)
    ring.add(1)
    assert ring.driver.publish()
    ring.device.silence()
    ring.device.pop()
    ring.add(2)
    assert not ring.driver.publish()
    assert not ring.device.listen()  # one has come meanwhile
    assert len(ring.device.pop()) == 1
    assert ring.device.listen()
    ring.add(3)
    assert ring.driver.publish()


@both
@pytest.mark.parametrize("event_idx", [False, True])
def test_interrupts_come_when_asked_for_and_only_then(packed: bool, event_idx: bool) -> None:
    ring = Ring(packed=packed, event_idx=event_idx)
    for token in range(4):
        ring.add(token)
    ring.driver.publish()
    heads = [element.head for element in ring.device.pop()]
    ring.device.push(heads[0], 0)
    assert ring.device.flush()
    ring.driver.silence()
    ring.driver.take_used()
    ring.device.push(heads[1], 0)
    assert not ring.device.flush()
    assert not ring.driver.listen()  # one has come meanwhile
    ring.driver.take_used()
    assert ring.driver.listen()
    ring.device.push(heads[2], 0)
    assert ring.device.flush()


@both
def test_an_interrupt_can_be_asked_for_after_several(packed: bool) -> None:
    ring = Ring(packed=packed)
    for token in range(6):
        ring.add(token)
    ring.driver.publish()
    heads = [element.head for element in ring.device.pop()]
    assert ring.driver.listen(4)
    told = []
    for head in heads:
        ring.device.push(head, 0)
        told.append(ring.device.flush())
    assert told == [False, False, False, True, False, False]


@both
def test_split_and_packed_rings_go_on_beyond_the_16_bits_of_an_index(packed: bool) -> None:
    ring = Ring(packed=packed, num=256, indirect=False)
    for first in range(0, 66_000, 251):
        tokens = range(first, first + 251)
        for token in tokens:
            ring.driver.add(token, ((BUFFERS_AT, 1),))
        assert ring.driver.publish()
        for element in ring.device.pop():
            ring.device.push(element.head, 0)
        assert ring.device.listen()
        assert ring.device.flush()
        assert ring.driver.take_used() == [(token, 0) for token in tokens]
        assert ring.driver.listen()


def test_a_full_ring_refuses() -> None:
    ring = Ring(packed=False, num=4, indirect=False)
    ring.add(1, out=3)
    assert ring.driver.has_room(1)
    assert not ring.driver.has_room(2)
    with pytest.raises(ValueError, match="no room"):
        ring.add(2, out=2)


@both
@given(seed=st.integers(0, 1 << 32), num=st.sampled_from([4, 8]), indirect=st.booleans())
def test_requests_come_back_once_whatever_the_order_and_the_stops(
    packed: bool, seed: int, num: int, indirect: bool
) -> None:
    """A model: what was added and published, what was taken, what was given back."""
    ring = Ring(packed=packed, num=num, indirect=indirect)
    chance = random.Random(seed)
    added: list[int] = []
    unpublished: list[int] = []
    flying: dict[int, int] = {}
    pushed: list[int] = []
    token = 0
    for _ in range(120):
        what = chance.randrange(6)
        if what == 0 and ring.driver.has_room(3):
            ring.add(token, out=chance.randrange(1, 3), into=chance.randrange(2))
            unpublished.append(token)
            token += 1
        elif what == 1:
            ring.driver.publish()
            added += unpublished
            unpublished.clear()
        elif what == 2:
            for element in ring.device.pop(chance.randrange(1, 4)):
                first = element.readable[0][0]
                assert (first - BUFFERS_AT) // 64 == added[0] % 256
                flying[element.head] = added.pop(0)
        elif what == 3 and flying:
            head = chance.choice(list(flying))
            ring.device.push(head, 1)
            ring.device.flush()
            pushed.append(flying.pop(head))
        elif what == 4:
            assert [back for back, _ in ring.driver.take_used()] == pushed
            pushed.clear()
        elif what == 5:
            ring = migrated(ring, packed=packed, indirect=indirect)
        assert ring.device.broken is None
        assert ring.driver.broken is None
        assert len(ring.device.in_flight) == len(flying)
        everything = len(added) + len(unpublished) + len(flying) + len(pushed)
        assert ring.driver.outstanding == everything


def migrated(ring: Ring, *, packed: bool, indirect: bool) -> Ring:
    other = Ring(packed=packed, num=ring.place.num, indirect=indirect)
    other.ram.data[:] = ring.ram.data
    other.driver.load("driver", through_msgpack(ring.driver.save()))
    other.device.load("device", through_msgpack(ring.device.save()))
    assert other.driver.save() == ring.driver.save()
    assert other.device.save() == ring.device.save()
    return other


@both
def test_a_state_that_does_not_add_up_is_refused(packed: bool) -> None:
    ring = Ring(packed=packed)
    for token in range(3):
        ring.add(token)
    ring.driver.publish()
    ring.device.pop(2)
    good = through_msgpack(ring.device.save())
    changes: list[dict[str, Any]] = [
        {"in_flight": []},
        {"in_flight": good["in_flight"][:1]},
        {"in_flight": good["in_flight"] + good["in_flight"][:1]},
        {"in_flight": [[8, 1, [BUFFERS_AT, 1], []], good["in_flight"][1]]},
        {"in_flight": [[0, 1, [RAM_BYTES, 1], []], good["in_flight"][1]]},
        {"in_flight": [[0, 1, [BUFFERS_AT], []], good["in_flight"][1]]},
        {"used_idx": 1},
        {"last_avail_idx": 1},
        {"num": 4},
        {"desc": 4096},
        {"packed": not packed},
        {"broken": 1},
        {"more": 1},
    ]
    for change in changes:
        with pytest.raises(MessageError):
            ring.device.load("device", {**good, **change})
    ring.device.load("device", good)
    with pytest.raises(MessageError):
        ring.device.load("device", [good])


@both
def test_a_driver_state_that_does_not_add_up_is_refused(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.add(1)
    ring.driver.publish()
    ring.add(2)
    good = through_msgpack(ring.driver.save())
    split: list[dict[str, Any]] = [
        {"avail_idx": 1},
        {"last_used_idx": 1},
        {"free": good.get("free", [])[1:]},
    ]
    split += [{"chains": [[1, [0]]]}, {"published_idx": 3}]
    packing: list[dict[str, Any]] = [
        {"next_slot": 1},
        {"held": None},
        {"free_slots": 8},
        {"used_wrap": False},
    ]
    packing += [{"free_ids": []}, {"held": [9, 0]}]
    for change in packing if packed else split:
        with pytest.raises(MessageError):
            ring.driver.load("driver", {**good, **change})
    ring.driver.load("driver", good)


@both
def test_a_used_entry_that_nobody_asked_for_breaks_the_driver(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.add(5)
    ring.driver.publish()
    if packed:
        ring.put(0, 0, 0, 3, AVAIL | USED)
    else:
        struct.pack_into("<HHII", ring.ram.data, ring.place.used, 0, 1, 3, 0)
    assert ring.driver.take_used() == []
    assert "3 came back but was not out" in str(ring.driver.broken)
    assert ring.driver.listen()


def test_a_used_index_that_cannot_be_breaks_the_driver() -> None:
    ring = Ring(packed=False)
    ring.add(5)
    ring.driver.publish()
    struct.pack_into("<H", ring.ram.data, ring.place.used + 2, 2)
    assert ring.driver.take_used() == []
    assert "used index 2" in str(ring.driver.broken)
    assert ring.driver.listen()
