"""Memory of another process is written where it should be, and nowhere else."""

import mmap
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import LandingError
from migrate.qemu.landing import QemuRam, is_writable
from migrate.qemu.process_memory import MAX_VECTORS, ProcessMemory
from proto.guest_events import PAGE_SIZE
from tests.strategies import page_array

PAGES = 3 * MAX_VECTORS
"""Enough for more runs than one call takes, with a page between any two."""

CHILD = f"""
import ctypes, mmap, sys
area = mmap.mmap(-1, {PAGES * PAGE_SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for line in sys.stdin:
    first, count = map(int, line.split())
    print(sum(map(any, (area[p * 4096 : p * 4096 + 4096] for p in range(first, first + count)))),
          flush=True)
"""


@dataclass
class Child:
    """Another process with an area of zero memory."""

    process: "subprocess.Popen[str]"
    base: int

    def dirty_pages(self) -> int:
        """How many pages of its area it finds not zero itself."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(0, PAGES, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield Child(process, int(process.stdout.readline()))
        process.kill()


def content(pages: list[int], salt: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    rows = np.zeros((len(pages), PAGE_SIZE), np.uint8)
    rows[:, :8] = (np.array(pages, np.uint64)[:, None] + salt).view(np.uint8)
    return rows


@given(st.sets(st.integers(0, PAGES - 1), min_size=1, max_size=300), st.integers(1, 1 << 40))
def test_pages_land_where_they_belong(child: Child, chosen: set[int], salt: int) -> None:
    memory = ProcessMemory(child.process.pid)
    try:
        pages = sorted(chosen)
        every = page_array(range(PAGES))
        before, after = (np.empty((PAGES, PAGE_SIZE), np.uint8) for _ in range(2))
        memory.read_pages(child.base, every, before)
        memory.write_pages(child.base, page_array(pages), content(pages, salt))
        memory.read_pages(child.base, every, after)
        before[pages] = content(pages, salt)
        assert np.array_equal(before, after)
    finally:
        memory.close()


def test_more_runs_than_one_call_takes(child: Child) -> None:
    memory = ProcessMemory(child.process.pid)
    pages = list(range(0, PAGES, 2))
    assert len(pages) > MAX_VECTORS
    memory.write_pages(child.base, page_array(pages), content(pages, 99))
    read = np.empty((len(pages), PAGE_SIZE), np.uint8)
    memory.read_pages(child.base, page_array(pages), read)
    memory.close()
    assert np.array_equal(read, content(pages, 99))


def test_zeroing_leaves_nothing_and_touches_only_what_is_not_zero(child: Child) -> None:
    memory = ProcessMemory(child.process.pid)
    ram = QemuRam(memory, child.base, PAGES, fresh=False)
    ram.write(page_array([5, 6, 700]), content([5, 6, 700], 1))
    written = 0
    write = ram.write

    def counting(pages: np.ndarray[tuple[int], np.dtype[np.uint32]], data: object) -> None:
        nonlocal written
        written += len(pages)
        write(pages, data)  # type: ignore[arg-type]

    dirty = child.dirty_pages()
    ram.write = counting  # type: ignore[method-assign]
    ram.zero(page_array(range(PAGES)))
    assert child.dirty_pages() == 0
    assert written == dirty >= 3
    memory.close()


def test_a_page_outside_of_the_ram_is_refused(child: Child) -> None:
    memory = ProcessMemory(child.process.pid)
    ram = QemuRam(memory, child.base, PAGES, fresh=True)
    data = np.ones((2, PAGE_SIZE), np.uint8)
    with pytest.raises(LandingError, match=f"page {PAGES} is outside"):
        ram.write(page_array([0, PAGES]), data)
    with pytest.raises(LandingError, match="is outside"):
        ram.read_into(page_array([PAGES]), data[:1])
    memory.close()


def test_memory_that_is_not_there_is_an_error() -> None:
    area = mmap.mmap(-1, PAGE_SIZE)
    area.close()
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=-1, stdout=-1, text=True
    ) as child:
        assert child.stdout is not None
        base = int(child.stdout.readline())
        memory = ProcessMemory(child.pid)
        data = np.ones((1, PAGE_SIZE), np.uint8)
        with pytest.raises(LandingError, match="Bad address"):
            memory.write_pages(PAGE_SIZE, page_array([0]), data)
        child.kill()
        child.wait()
        with pytest.raises(LandingError, match="has ended"):
            memory.write_pages(base, page_array([0]), data)
        memory.close()
        with pytest.raises(LandingError, match="has ended"):
            memory.read_pages(base, page_array([0]), data)
    with pytest.raises(LandingError, match="cannot reach process"):
        ProcessMemory(child.pid)


MAPS = """\
7f00000000-7f00200000 rw-p 00000000 00:00 0
7f00200000-7f00400000 rw-s 00000000 00:01 17  /memfd:ram (deleted)
7f00400000-7f00401000 ---p 00000000 00:00 0
7f00402000-7f00500000 rw-p 00000000 00:00 0
"""


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0x7F00000000, 0x7F00200000, True),
        (0x7F00001000, 0x7F00400000, True),
        (0x7F00001000, 0x7F00400001, False),
        (0x7EFFFFF000, 0x7F00100000, False),
        (0x7F00402000, 0x7F00500000, True),
        (0x7F00401000, 0x7F00500000, False),
        (0x7F00402000, 0x7F00501000, False),
    ],
)
def test_an_area_is_ours_to_write_only_if_the_process_may_write_all_of_it(
    start: int, end: int, expected: bool
) -> None:
    assert is_writable(MAPS, start, end - start) is expected
