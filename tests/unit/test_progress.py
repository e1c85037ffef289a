"""The live display: what it shows, how it redraws, and that it never waits for its reader."""

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.report.ledger import PageCounts
from migrate.report.progress import (
    MAX_PENDING_LINES,
    PLAIN_LINE_NS,
    REDRAW_NS,
    ProgressDisplay,
    ProgressState,
    plain_line,
    render,
)

STATE = ProgressState(
    phase="precopy",
    elapsed_ms=4123,
    round_no=3,
    ram_bytes=1 << 30,
    pages=PageCounts(zero=90_000, same=2, ref=400, delta=184_000, literal=120_000),
    wire_bytes=123 << 20,
    goodput_bps=24.6e6,
    remaining_bytes=30 << 20,
    round_bytes=120 << 20,
    dirty_pages_per_s=18_000.4,
    expected_downtime_ms=840,
    downtime_limit_ms=300,
    codec="zstd:1",
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal and has no file descriptor, so it never blocks."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Interpret the two escape sequences the display uses."""
        lines: list[str] = []
        text = self.getvalue()
        while text:
            if text.startswith("\x1b[J"):
                text = text[3:]
            elif text.startswith("\x1b["):
                count, _, text = text[2:].partition("F")
                del lines[-int(count) :]
            else:
                line, _, text = text.partition("\n")
                lines.append(line)
        return lines


def test_the_block_shows_what_matters() -> None:
    assert render(STATE, 120) == [
        "precopy  round 3  4.12 s",
        "█" * 30 + "░" * 10 + " 30.0 MiB remaining",
        "zero 90 000  same 2  ref 400  delta 184 000  literal 120 000",
        "link 197 Mbit/s  sent 123 MiB  codec zstd:1",
        "downtime if stopped now 840 ms (limit 300 ms)  dirtied 18 000 pages/s",
    ]


def test_what_is_not_known_is_a_dash() -> None:
    assert render(ProgressState(phase="waiting"), 80) == ["waiting  0.0 ms"]
    assert render(ProgressState(phase="precopy", round_no=0), 80) == [
        "precopy  round 0 (bulk)  0.0 ms",
        "remaining -",
        "zero 0  same 0  ref 0  delta 0  literal 0",
        "link -  sent 0 B  codec -",
        "downtime if stopped now -",
    ]


@given(st.integers(-5, 300), st.integers(0, 1 << 45), st.integers(0, 1 << 45))
def test_no_line_is_wider_than_the_terminal(width: int, remaining: int, length: int) -> None:
    state = ProgressState(
        phase="precopy", round_no=7, remaining_bytes=remaining, round_bytes=length
    )
    lines = render(state, width)
    assert len(lines) == 5
    assert max(map(len, lines)) <= max(20, width)


def test_the_plain_line_says_the_same() -> None:
    assert plain_line(STATE) == (
        "4.12 s  precopy  round 3  123 MiB sent  197 Mbit/s  30.0 MiB remaining  "
        "downtime if stopped now 840 ms (limit 300 ms)  dirtied 18 000 pages/s"
    )
    assert plain_line(ProgressState(phase="waiting", elapsed_ms=20)) == "20 ms  waiting"


def test_a_stopped_guest_has_no_downtime_to_expect() -> None:
    state = replace(STATE, phase="stop-and-copy")
    assert render(state, 120)[-1] == "the guest is stopped"
    assert plain_line(state).endswith("30.0 MiB remaining  the guest is stopped")
    assert "stopped" not in plain_line(replace(STATE, phase="done"))


@pytest.mark.parametrize(
    ("phase", "stopped"),
    [
        ("handover", True),
        ("stop-and-copy: link lost, reconnecting (2 s)", True),
        ("precopy: link lost, reconnecting (2 s)", False),
        ("connecting", False),
        ("back to pre-copy", False),
        ("done", False),
    ],
)
def test_a_guest_is_said_to_be_stopped_only_where_it_is(phase: str, *, stopped: bool) -> None:
    text = plain_line(replace(STATE, phase=phase))
    assert ("the guest is stopped" in text) == stopped


def test_a_destination_shows_what_arrived() -> None:
    state = ProgressState(phase="precopy", round_no=1, wire_bytes=5 << 20, receiving=True)
    assert render(state, 80) == [
        "precopy  round 1  0.0 ms",
        "zero 0  same 0  ref 0  delta 0  literal 0",
        "received 5.00 MiB",
    ]
    assert plain_line(state) == "0.0 ms  precopy  round 1  5.00 MiB received"


def test_a_rate_that_was_not_measured_yet_is_not_shown() -> None:
    assert "dirtied" not in plain_line(replace(STATE, dirty_pages_per_s=0))


def test_the_bar_remembers_where_the_round_began() -> None:
    stream = Terminal()
    display = ProgressDisplay(stream, columns=lambda: 81)
    filled = []
    for n, (round_no, remaining) in enumerate([(0, 100), (0, 75), (0, 0), (1, 40), (1, 20)]):
        state = replace(STATE, round_no=round_no, remaining_bytes=remaining, round_bytes=None)
        display.update(state, n * REDRAW_NS)
        filled.append(stream.screen()[1].count("█"))
    assert filled == [0, 10, 40, 0, 20]


def test_a_terminal_is_redrawn_in_place_with_logs_above() -> None:
    stream = Terminal()
    display = ProgressDisplay(stream, columns=lambda: 81)
    display.update(ProgressState(phase="waiting"), 0)
    display.log("connected")
    display.update(STATE, 1)
    display.update(STATE, 2 * REDRAW_NS)
    assert stream.screen() == ["connected", *render(STATE, 80)]
    display.close()
    assert stream.screen() == ["connected"]


def test_a_terminal_is_redrawn_at_most_ten_times_a_second_within_a_round() -> None:
    stream = Terminal()
    display = ProgressDisplay(stream, columns=lambda: 81)
    display.update(STATE, 0)
    before = stream.getvalue()
    display.update(STATE, REDRAW_NS - 1)
    assert stream.getvalue() == before
    display.update(STATE, REDRAW_NS)
    assert stream.getvalue() != before


def test_a_pipe_gets_a_line_per_round_and_one_every_five_seconds() -> None:
    stream = io.StringIO()
    display = ProgressDisplay(stream)
    for now_ns in range(0, 2 * PLAIN_LINE_NS + 1, PLAIN_LINE_NS // 10):
        display.update(STATE, now_ns)
    assert stream.getvalue() == 3 * f"{plain_line(STATE)}\n"
    display.update(ProgressState(phase="stop-and-copy", round_no=3), 2 * PLAIN_LINE_NS + 1)
    assert stream.getvalue().count("\n") == 4
    assert "\x1b" not in stream.getvalue()


def test_quiet_shows_logs_only() -> None:
    stream = Terminal()
    display = ProgressDisplay(stream, quiet=True)
    display.update(STATE, 0)
    display.log("warning: x")
    display.close()
    assert stream.getvalue() == "warning: x\n"


@pytest.fixture
def full_pipe() -> Iterator[tuple[TextIO, int]]:
    """A pipe nobody reads, filled to the brim; yields its writing stream and reading end."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    with os.fdopen(writer, "w") as stream:
        yield stream, reader
    os.close(reader)


def test_a_reader_that_stands_still_costs_drawings_and_delays_logs(
    full_pipe: tuple[TextIO, int],
) -> None:
    stream, reader = full_pipe
    display = ProgressDisplay(stream)
    for number in range(MAX_PENDING_LINES + 50):
        display.log(f"line {number}")
        display.update(STATE, number * PLAIN_LINE_NS)
    os.read(reader, 1 << 20)
    display.update(STATE, 0)
    text = os.read(reader, 1 << 20).decode()
    expected = [f"line {number}" for number in range(50, MAX_PENDING_LINES + 50)]
    assert text.splitlines() == [*expected, plain_line(STATE)]


def test_a_reader_that_is_gone_ends_the_display() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    display = ProgressDisplay(stream)
    display.update(STATE, 0)
    display.log("x")
    display.close()
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_a_closed_stream_ends_the_display() -> None:
    stream = io.StringIO()
    display = ProgressDisplay(stream)
    stream.close()
    display.log("x")
    display.update(STATE, 0)
    display.close()
    assert stream.closed
