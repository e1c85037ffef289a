"""RAM records: every way through the scanner gives the batches that the plain loop would give."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from proto.errors import QemuStreamError
from proto.guest_events import PAGE_SIZE, PageRun, RamBlock, RoundEnd, ZeroRun
from proto.qemu.ram import RamScanner, Stop, page_buffer, page_records, zero_records
from tests.qemu_streams import EOS, page_of, record, str8
from tests.strategies import page_array

BLOCK = RamBlock("pc.ram", 100_000 * PAGE_SIZE)
OTHER = RamBlock("pc.bios", 16 * PAGE_SIZE)
NAME = b"pc.ram"


def scan(body: bytes, piece_bytes: int | None = None) -> list[PageRun | ZeroRun | RoundEnd]:
    """Scan a section body, growing what is there by ``piece_bytes`` at a time."""
    scanner = RamScanner([BLOCK, OTHER])
    buf = np.frombuffer(body, np.uint8)
    pos, stop = 0, Stop.NEED_DATA
    for end in [*range(0, len(body), piece_bytes or len(body)), len(body)]:
        assert stop is Stop.NEED_DATA
        pos, stop = scanner.scan(buf, pos, end)
    assert (pos, stop) == (len(body), Stop.END)
    return scanner.events


def shape(events: list[PageRun | ZeroRun | RoundEnd]) -> list[tuple[str, int, list[int]]]:
    shapes: list[tuple[str, int, list[int]]] = []
    for event in events:
        if isinstance(event, RoundEnd):
            shapes.append(("round", event.round_no, []))
        else:
            kind = "pages" if isinstance(event, PageRun) else "zeros"
            shapes.append((kind, event.block, event.pages.tolist()))
    return shapes


def data_of(pages: NDArray[np.uint32]) -> NDArray[np.uint8]:
    content = b"".join(page_of(page + 1) for page in pages.tolist())
    return np.frombuffer(content, np.uint8).reshape(-1, PAGE_SIZE)


page_sets = st.sets(st.integers(0, 600), min_size=1, max_size=300).map(
    lambda pages: page_array(sorted(pages))
)


@given(page_sets, st.booleans(), st.sampled_from([None, 1000, 4104, 65536]))
def test_written_page_records_are_read_again(
    pages: NDArray[np.uint32], in_place: bool, piece_bytes: int | None
) -> None:
    data = data_of(pages)
    if in_place:
        data = page_buffer(len(pages))
        data[:] = data_of(pages)
    body = b"".join(page_records(BLOCK, pages, data, named=True)) + EOS
    events = scan(body, piece_bytes)
    runs = [event for event in events if isinstance(event, PageRun)]
    assert events == runs
    assert [len(run.pages) for run in runs[:-1]] == [256] * (len(runs) - 1)
    assert np.array_equal(np.concatenate([run.pages for run in runs]), pages)
    assert np.array_equal(np.concatenate([run.data for run in runs]), data_of(pages))


@given(page_sets, st.sampled_from([None, 1, 100]))
def test_written_zero_records_are_read_again(
    pages: NDArray[np.uint32], piece_bytes: int | None
) -> None:
    body = zero_records(BLOCK, pages, named=True) + EOS
    assert shape(scan(body, piece_bytes)) == [("zeros", 0, pages.tolist())]


def test_records_without_a_name_continue_the_block() -> None:
    pages = page_array([3, 4])
    first = record(2, page_of(1), NAME)
    with_data = b"".join(page_records(BLOCK, pages, data_of(pages), named=False))
    assert with_data == record(3, page_of(4)) + record(4, page_of(5))
    zeros = zero_records(BLOCK, page_array([5, 9]), named=False)
    assert zeros == record(5, 0) + record(9, 0)
    events = scan(first + with_data + zeros + EOS)
    assert shape(events) == [("zeros", 0, [5, 9]), ("pages", 0, [2, 3, 4])]


def test_page_buffer_is_written_without_a_copy() -> None:
    data = page_buffer(3)
    data[:] = 7
    buffers = page_records(BLOCK, page_array([1, 2, 3]), data, named=False)
    assert len(buffers) == 1
    assert np.shares_memory(np.frombuffer(buffers[0], np.uint8), data)


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 4), slice(None, None, -1)])
def test_a_part_of_a_page_buffer_is_written_as_it_is(rows: slice) -> None:
    whole = page_buffer(4)
    whole[:] = data_of(page_array(range(4)))
    data = whole[rows]
    pages = page_array(range(len(data)))
    written = b"".join(page_records(BLOCK, pages, data, named=False))
    assert written == b"".join(record(i, row.tobytes()) for i, row in enumerate(data))


def test_other_memory_of_the_same_shape_is_no_page_buffer() -> None:
    whole = np.empty((3, 8 + PAGE_SIZE), np.uint8)
    whole[:] = np.arange(8 + PAGE_SIZE) % 251
    rows = whole[:, :PAGE_SIZE].copy()
    written = b"".join(
        page_records(BLOCK, page_array(range(3)), whole[:, :PAGE_SIZE], named=False)
    )
    assert written == b"".join(record(i, row.tobytes()) for i, row in enumerate(rows))


def test_a_view_of_received_bytes_is_written() -> None:
    data = np.ndarray((1, PAGE_SIZE), np.uint8, page_of(5))
    assert b"".join(page_records(BLOCK, page_array([1]), data, named=False)) == record(
        1, page_of(5)
    )


# --- where a batch ends -------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 2, 15, 16, 17, 40, 256, 300])
@pytest.mark.parametrize("piece_bytes", [None, 5000])
def test_runs_of_any_length_end_batches_at_256_pages(
    period: int, piece_bytes: int | None
) -> None:
    contents = [page_of(i) if i // period % 2 == 0 else 0 for i in range(900)]
    body = record(0, contents[0], NAME) + b"".join(
        record(i, content) for i, content in enumerate(contents[1:], 1)
    )
    events = scan(body + EOS, piece_bytes)
    ram: dict[int, bytes] = {}
    full = [event for event in events if isinstance(event, PageRun)]
    assert [len(run.pages) for run in full[:-1]] == [256] * (len(full) - 1)
    for event in events:
        assert not isinstance(event, RoundEnd)
        rows = event.data if isinstance(event, PageRun) else np.zeros((len(event.pages), 4096))
        ram |= {
            page: row.astype(np.uint8).tobytes()
            for page, row in zip(event.pages.tolist(), rows, strict=True)
        }
    assert [ram[i] for i in range(900)] == [
        c if isinstance(c, bytes) else bytes(4096) for c in contents
    ]


def test_a_batch_ends_where_it_is_told_to_from_the_next_one_on() -> None:
    scanner = RamScanner([BLOCK])

    def runs(first: int, count: int) -> list[int]:
        body = record(first, page_of(first), NAME) + b"".join(
            record(page, page_of(page)) for page in range(first + 1, first + count)
        )
        scanner.scan(np.frombuffer(body, np.uint8), 0, len(body))
        events, scanner.events = scanner.events, []
        assert all(
            row.tobytes() == page_of(page)
            for event in events
            if isinstance(event, PageRun)
            for page, row in zip(event.pages.tolist(), event.data, strict=True)
        )
        return [len(event.pages) for event in events if isinstance(event, PageRun)]

    assert runs(0, 10) == []
    scanner.set_run_pages(700)
    assert runs(10, 1000) == [256, 700]
    scanner.set_run_pages(256)
    scanner.flush()
    assert runs(1010, 300) == [54, 256]


def test_a_zero_run_ends_at_its_limit() -> None:
    body = zero_records(BLOCK, np.arange(70_000, dtype=np.uint32), named=True) + EOS
    events = scan(body)
    assert [len(event.pages) for event in events if isinstance(event, ZeroRun)] == [65536, 4464]


def test_a_step_back_ends_the_batch_and_the_round() -> None:
    body = record(5, 0, NAME) + record(6, page_of(1)) + record(6, page_of(2)) + record(2, 0)
    assert shape(scan(body + EOS)) == [
        ("zeros", 0, [5]),
        ("pages", 0, [6]),
        ("round", 0, []),
        ("pages", 0, [6]),
        ("round", 1, []),
        ("zeros", 0, [2]),
    ]


def test_a_step_back_inside_equal_records_ends_the_round() -> None:
    pages = [*range(50, 90), *range(20, 60)]
    body = b"".join(
        record(page, 0, NAME if page == 50 and i == 0 else None) for i, page in enumerate(pages)
    )
    assert shape(scan(body + EOS)) == [
        ("zeros", 0, list(range(50, 90))),
        ("round", 0, []),
        ("zeros", 0, list(range(20, 60))),
    ]


def test_a_later_block_is_no_step_back_and_an_earlier_one_is() -> None:
    body = record(9, 0, NAME) + record(2, 0, b"pc.bios") + record(10, 0, NAME)
    assert shape(scan(body + EOS)) == [
        ("zeros", 0, [9]),
        ("zeros", 1, [2]),
        ("round", 0, []),
        ("zeros", 0, [10]),
    ]


def test_the_block_is_remembered_across_sections() -> None:
    scanner = RamScanner([BLOCK, OTHER])
    for body in (record(3, 0, b"pc.bios") + EOS, record(4, 0) + EOS):
        scanner.scan(np.frombuffer(body, np.uint8), 0, len(body))
    assert shape(scanner.events) == [("zeros", 1, [3]), ("zeros", 1, [4])]


def test_few_pages_do_not_keep_a_whole_batch_of_memory() -> None:
    (run,) = scan(record(1, page_of(1), NAME) + EOS)
    assert isinstance(run, PageRun)
    assert run.data.base is None or run.data.base.nbytes <= PAGE_SIZE


def test_batches_own_their_data() -> None:
    scanner = RamScanner([BLOCK])
    received = bytearray(b"".join([record(1, page_of(1), NAME), record(2, 0), EOS]))
    scanner.scan(np.frombuffer(received, np.uint8), 0, len(received))
    received[:] = bytes(len(received))
    zeros, run = scanner.events
    assert isinstance(zeros, ZeroRun)
    assert isinstance(run, PageRun)
    assert run.data.tobytes() == page_of(1)
    assert (run.pages.tolist(), zeros.pages.tolist()) == ([1], [2])


# --- records that are no plain page -------------------------------------------------------------


@pytest.mark.parametrize("run", [1, 40])
def test_a_zero_record_with_another_byte_fills_the_page(run: int) -> None:
    body = record(0, 0x55, NAME) + b"".join(record(page, 0x55) for page in range(1, run))
    (event,) = scan(body + EOS)
    assert isinstance(event, PageRun)
    assert event.pages.tolist() == list(range(run))
    assert (event.data == 0x55).all()


@pytest.mark.parametrize("flag", [0x40, 0x100])
@pytest.mark.parametrize("named", [True, False])
def test_an_unknown_record_names_its_block_for_the_destination(flag: int, named: bool) -> None:
    scanner = RamScanner([BLOCK, OTHER])
    word = (7 << 12 | flag | (0 if named else 0x20)).to_bytes(8)
    name = str8(b"pc.bios")
    body = record(3, 0, b"pc.bios") + word + (name if named else b"") + b"content"
    pos, stop = scanner.scan(np.frombuffer(body, np.uint8), 0, len(body))
    assert (body[pos:], stop) == (b"content", Stop.UNKNOWN)
    assert scanner.unknown is not None
    assert scanner.unknown.head == (7 << 12 | flag).to_bytes(8) + name
    assert shape(scanner.events) == [("zeros", 1, [3])]


def test_an_unknown_record_waits_for_its_whole_name() -> None:
    scanner = RamScanner([BLOCK])
    body = (0x40).to_bytes(8) + str8(NAME)
    for end in range(len(body)):
        assert scanner.scan(np.frombuffer(body, np.uint8), 0, end) == (0, Stop.NEED_DATA)
    assert scanner.scan(np.frombuffer(body, np.uint8), 0, len(body)) == (
        len(body),
        Stop.UNKNOWN,
    )


@pytest.mark.parametrize(
    "body",
    [
        record(0, 0),
        (0x60).to_bytes(8),
        record(100_000, 0, NAME),
        record(0, 0, NAME) + b"".join(record(page, 0) for page in range(99_990, 100_010)),
        record(16, page_of(1), b"pc.bios"),
        record(0, 0, b"pc.rom"),
        *[flags.to_bytes(8) + str8(NAME) for flags in (0, 1, 4, 0xA, 0x12, 0x80, 0x200, 0x800)],
    ],
)
def test_a_record_that_no_qemu_writes_is_refused(body: bytes) -> None:
    with pytest.raises(QemuStreamError):
        scan(body + EOS)
