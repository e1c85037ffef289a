"""Lists of page and slot numbers as PAGES carries them: as runs where that is shorter.

All arrays are u32. No Python loop runs over pages.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from proto.errors import MessageError
from proto.limits import MAX_ZERO_PAGES, MAX_ZERO_RUNS, NOT_CACHED

U32: Final = np.dtype("<u4")

Pages = NDArray[np.uint32]

NO_PAGES: Final[Pages] = np.zeros(0, U32)
"""A list without any page, read-only."""

NO_PAGES.flags.writeable = False


def zero_runs(pages: Pages) -> Pages:
    """Pack strictly increasing pages as runs: first page, count, and so on."""
    if not len(pages):
        return NO_PAGES
    return _runs(pages, np.flatnonzero(np.diff(pages) != 1) + 1)


def split_zero_pages(pages: Pages) -> list[Pages]:
    """Cut strictly increasing pages into views that each fit one batch."""
    pieces = []
    while len(pages):
        head = pages[:MAX_ZERO_PAGES]
        breaks = np.flatnonzero(np.diff(head) != 1) + 1
        if len(breaks) >= MAX_ZERO_RUNS:
            head = head[: breaks[MAX_ZERO_RUNS - 1]]
        pieces.append(head)
        pages = pages[len(head) :]
    return pieces


def expand_zero_runs(where: str, words: Pages, limit: int) -> Pages:
    """Turn zero runs into page numbers.

    Args:
        where: Names the frame in errors.
        words: First page and count of each run, at least one.
        limit: Pages of the block.

    Raises:
        MessageError: They are too many pages, not in order, or out of range.
    """
    starts = words[0::2].astype(np.int64)
    counts = words[1::2].astype(np.int64)
    total = int(counts.sum())
    if not counts.all() or total > MAX_ZERO_PAGES:
        raise MessageError(
            where, f"zero runs of 1 to {MAX_ZERO_PAGES} pages in all", str(total)
        )
    ends = starts + counts
    if (starts[1:] < ends[:-1]).any():
        raise MessageError(where, "zero runs in increasing order", "overlapping ones")
    if ends[-1] > limit:
        raise MessageError(where, f"zero pages below {limit}", str(int(ends[-1]) - 1))
    offsets = starts - np.concatenate(([0], np.cumsum(counts)[:-1]))
    return (np.repeat(offsets, counts) + np.arange(total)).astype(np.uint32)


def pack_list(numbers: Pages) -> tuple[Pages, int]:
    """Pack page or slot numbers as runs where that is shorter: the words, and how many runs.

    Numbers that go up by one form a run, and so does ``NOT_CACHED`` again and again. 0 runs: the
    words are the numbers themselves.
    """
    count = len(numbers)
    if count < 3:
        return numbers, 0
    if _is_one_run(numbers):  # nearly always, and then the rest is too dear
        return np.array((numbers[0], count), U32), 1
    steps = np.diff(numbers)  # unsigned: a step down is a large number, no run
    none = (numbers[1:] == NOT_CACHED) | (numbers[:-1] == NOT_CACHED)
    breaks = np.flatnonzero(np.where(none, steps != 0, steps != 1)) + 1
    if 2 * (len(breaks) + 1) >= count:
        return numbers, 0
    return _runs(numbers, breaks), len(breaks) + 1


def unpack_list(where: str, words: Pages, runs: int, count: int) -> Pages:
    """Undo ``pack_list``.

    Args:
        where: Names the frame in errors.
        words: ``2 * runs`` of them, or ``count`` where ``runs`` is 0.
        runs: Number of runs.
        count: Numbers that must come of it; bounds what is allocated.

    Raises:
        MessageError: The runs do not hold exactly ``count`` numbers, or numbers above 32 bits.
    """
    if not runs:
        return words
    if runs == 1:
        first, length = int(words[0]), int(words[1])
        if length == count and first == NOT_CACHED:
            return np.full(count, NOT_CACHED, np.uint32)
        if length == count and first + count <= NOT_CACHED:
            return np.arange(first, first + count, dtype=np.uint32)
    firsts, lengths = words[0::2].astype(np.int64), words[1::2].astype(np.int64)
    total = int(lengths.sum())
    if total != count or not lengths.all():
        raise MessageError(where, f"runs of {count} pages in all, none empty", str(total))
    within = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    within[np.repeat(firsts == NOT_CACHED, lengths)] = 0
    numbers = np.repeat(firsts, lengths) + within
    if numbers.max() > NOT_CACHED:
        raise MessageError(where, "numbers of 32 bits", str(int(numbers.max())))
    return numbers.astype(np.uint32)


def _runs(numbers: Pages, breaks: NDArray[np.intp]) -> Pages:
    """First number and length of each run; ``breaks`` are the indices where another begins."""
    starts = np.concatenate(([0], breaks))
    runs = np.empty((len(starts), 2), U32)
    runs[:, 0] = numbers[starts]
    runs[:, 1] = np.diff(starts, append=len(numbers))
    return runs.reshape(-1)


def _is_one_run(numbers: Pages) -> bool:
    first, last = int(numbers[0]), int(numbers[-1])
    if first == NOT_CACHED:
        return bool((numbers == NOT_CACHED).all())
    if last - first != len(numbers) - 1 or last == NOT_CACHED:
        return False
    return bool((numbers[1:] - numbers[:-1] == 1).all())
