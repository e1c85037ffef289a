"""The tail of a stream: its end is found exactly, and the run state is read out of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import QemuStreamError
from proto.qemu.tail import TailScanner, end_mark_offset
from tests import golden_streams
from tests import qemu_streams as qs
from tests.strategies import cuts

TAILS = {
    name: tail
    for name in golden_streams.names()
    if name != "10.0-multifd"
    for op in qs.Reference(golden_streams.load(name)).parse()
    if op[0] == "tail" and isinstance(tail := op[1], bytes)
}


def scanner_of(data: bytes) -> TailScanner:
    scanner = TailScanner()
    scanner.feed(data)
    return scanner


@pytest.mark.parametrize("name", TAILS)
def test_a_recorded_tail_ends_at_its_last_byte_and_not_before(name: str) -> None:
    tail = TAILS[name]
    at = end_mark_offset(tail)
    assert json.loads(tail[at + 6 :])["page_size"] == 4096
    description = tail[at:]
    scanner = scanner_of(tail[:at])
    assert not scanner.ended()
    for i in range(len(description) - 1):
        scanner.feed(description[i : i + 1])
        assert description[i] != ord("}") or not scanner.ended()
    scanner.feed(description[-1:])
    assert scanner.ended()
    assert scanner.run_state() == "running"


@given(st.lists(st.integers(0, 10**6), max_size=20))
def test_the_end_is_found_however_the_tail_is_cut(at: list[int]) -> None:
    tail = TAILS["10.0-plain"]
    scanner = TailScanner()
    for piece in cuts(tail, at):
        scanner.feed(piece)
        assert scanner.ended() == (len(scanner.data) == len(tail))


@given(st.binary(max_size=200))
def test_garbage_has_no_end(garbage: bytes) -> None:
    scanner = scanner_of(garbage + b"}")
    assert not scanner.ended()
    assert scanner.run_state() is None
    with pytest.raises(QemuStreamError, match="an end mark"):
        end_mark_offset(garbage + b"}")


def mark(text: bytes, length: int | None = None) -> bytes:
    return b"\0\6" + (len(text) if length is None else length).to_bytes(4) + text


@pytest.mark.parametrize(
    "data",
    [
        mark(b'{"page_size": 4096'),
        mark(b'{"page_size": 4096}', 20),
        mark(b'{"page_size": 4096}', 18),
        mark(b'{"other": 4096}'),
        mark(b'{"page_size": }'),
        mark(b'{"page_size": ' + b"[" * 100_000 + b"}"),
        mark(b'{"page_size": ' + b"1" * 5000 + b"}"),
        mark(b'{"page_size": "\xff"}'),
        b"\0\7" + mark(b'{"page_size": 1}')[2:],
    ],
)
def test_what_looks_like_the_end_is_not_taken_for_it(data: bytes) -> None:
    assert not scanner_of(data).ended()


def test_a_false_mark_in_the_device_state_does_not_hide_the_true_one() -> None:
    false = mark(b'{"page_size": "')
    true = mark(qs.DESCRIPTION)
    reaching_the_end = mark(b'{"page_size": ', 14 + len(true))
    for before in (false, reaching_the_end, false + reaching_the_end):
        tail = before + true
        assert scanner_of(tail).ended()
        assert end_mark_offset(tail) == len(before)


@pytest.mark.parametrize("state", [b"running", b"paused", b"finish-migrate", b""])
def test_the_run_state_is_read(state: bytes) -> None:
    assert scanner_of(qs.tail(state)).run_state() == state.decode()


def test_the_last_run_state_counts() -> None:
    # Guest memory in a stream that is not understood may hold an older one.
    assert scanner_of(qs.tail(b"paused") + qs.tail(b"running")).run_state() == "running"


def test_device_state_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proto.qemu.tail.MAX_DEVICE_STATE_BYTES", 1000)
    scanner = scanner_of(bytes(1000))
    with pytest.raises(QemuStreamError, match="at most 1000 bytes"):
        scanner.feed(b"x")


def test_of_a_long_rest_only_the_end_is_kept() -> None:
    keep = 10_000
    scanner = TailScanner(keep)
    for _ in range(100):
        scanner.feed(bytes(3000))
        assert len(scanner.data) <= 2 * keep
    scanner.feed(qs.tail())
    assert scanner.ended()
    assert scanner.run_state() == "running"
