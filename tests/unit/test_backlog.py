"""The queue between stages keeps order, and its bound holds back whoever puts."""

from collections import deque

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from migrate.backlog import Backlog

sizes = st.integers(0, 50)


@given(st.lists(sizes, max_size=60), st.integers(1, 100), st.data())
def test_items_come_in_order_and_the_bytes_are_those_inside(
    items: list[int], limit_bytes: int, data: st.DataObject
) -> None:
    takes = data.draw(st.lists(st.booleans(), min_size=len(items), max_size=len(items)))

    async def main() -> None:
        backlog: Backlog[int] = Backlog(limit_bytes)
        model: deque[int] = deque()
        for number, (size, take) in enumerate(zip(items, takes, strict=True)):
            backlog.put_nowait(number, size)
            model.append(number)
            if take:
                assert await backlog.get() == model.popleft()
            assert backlog.bytes_waiting == sum(items[i] for i in model)
            assert backlog.is_empty == (not model)

    trio.run(main)


@given(st.lists(sizes, max_size=40), st.integers(1, 100), st.lists(sizes, min_size=40))
def test_no_more_waits_inside_than_the_limit_and_one_item(
    items: list[int], limit_bytes: int, pauses: list[int]
) -> None:
    backlog: Backlog[int] = Backlog(limit_bytes)
    taken: list[int] = []

    async def put_all() -> None:
        for number, size in enumerate(items):
            await backlog.put(number, size)
            assert backlog.bytes_waiting - size < limit_bytes

    async def take_all() -> None:
        for pause in pauses[: len(items)]:
            taken.append(await backlog.get())
            for _ in range(pause // 10):
                await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put_all)
            nursery.start_soon(take_all)

    trio.run(main)
    assert taken == list(range(len(items)))
    assert backlog.bytes_waiting == 0


async def test_put_waits_until_bytes_leave() -> None:
    backlog: Backlog[str] = Backlog(10)
    await backlog.put("one item always fits", 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backlog.put, "waits", 1)
        await trio.testing.wait_all_tasks_blocked()
        assert backlog.bytes_waiting == 100
        assert await backlog.get() == "one item always fits"
    assert backlog.bytes_waiting == 1


async def test_a_raised_limit_lets_a_waiting_put_go_on() -> None:
    backlog: Backlog[int] = Backlog(10)
    await backlog.put(1, 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backlog.put, 2, 10)
        await trio.testing.wait_all_tasks_blocked()
        assert backlog.bytes_waiting == 10
        backlog.set_limit(11)
    assert backlog.bytes_waiting == 20


async def test_get_waits_for_an_item() -> None:
    backlog: Backlog[str] = Backlog(10)
    got: list[str] = []

    async def take() -> None:
        got.append(await backlog.get())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        backlog.put_nowait("item", 1)
    assert got == ["item"]


@pytest.mark.parametrize("waiting_in", ["put", "get"])
async def test_a_cancelled_wait_leaves_nothing_behind(waiting_in: str) -> None:
    backlog: Backlog[int] = Backlog(1)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            if waiting_in == "put":
                backlog.put_nowait(0, 1)
                nursery.start_soon(backlog.put, 1, 5)
            else:
                nursery.start_soon(backlog.get)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    expected = 1 if waiting_in == "put" else 0
    assert backlog.bytes_waiting == expected
    backlog.put_nowait(7, 2)
    taken = [await backlog.get() for _ in range(expected + 1)]
    assert taken == [0, 7][-len(taken) :]
    assert backlog.is_empty
