"""When a source QEMU is done with a migration; a thread of this process stands for its own."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from migrate.qemu import return_path_thread
from migrate.qemu.return_path_thread import ReturnPathThread


@contextmanager
def begun(*version: int) -> Iterator[tuple[ReturnPathThread, threading.Event]]:
    """A migration's thread in a QEMU of that version, which ends with the event."""
    watched, ends = ReturnPathThread(os.getpid(), version), threading.Event()
    thread = threading.Thread(target=ends.wait)
    thread.start()
    try:
        watched.has_begun()
        yield watched, ends
    finally:
        ends.set()
        thread.join()


async def test_its_end_is_waited_for_whatever_deadline_passes() -> None:
    with begun(7, 2, 22) as (watched, ends):
        threading.Timer(0.2, ends.set).start()
        returned = False
        with trio.move_on_after(0.05):
            await watched.wait_gone()
            returned = True
        assert ends.is_set()
        assert returned


async def test_one_that_stays_is_waited_for_only_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(return_path_thread, "GONE_S", 0.05)
    with begun(8, 1, 5) as (watched, ends), trio.fail_after(5):
        await watched.wait_gone()
        assert not ends.is_set()


async def test_a_qemu_that_waits_itself_is_not_waited_for() -> None:
    with begun(8, 2, 0) as (watched, ends), trio.fail_after(1):
        await watched.wait_gone()
        assert not ends.is_set()
