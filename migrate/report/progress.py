"""The live display on stderr: a block redrawn in place, or plain lines where nobody looks.

``render`` and ``plain_line`` are pure. ``ProgressDisplay`` writes, and never waits for whoever
reads: behind a terminal stopped with Ctrl-S or a full pipe, drawings are lost and log lines
wait (up to ``MAX_PENDING_LINES``), and the guest does not notice.
"""

import os
import select
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, TextIO

from migrate.report.ledger import PAGE_CLASSES, PageCounts
from migrate.units import NS_PER_MS, NS_PER_S, format_count, format_ms, format_rate, format_size

REDRAW_NS: Final = 100 * NS_PER_MS
"""Shortest time between two drawings of the block."""

PLAIN_LINE_NS: Final = 5 * NS_PER_S
"""Longest time between two plain lines while something goes on."""

MAX_PENDING_LINES: Final = 200
"""Log lines kept while stderr takes nothing; older ones are dropped."""

_BAR: Final = "█"
_BAR_REST: Final = "░"
_MIN_WIDTH: Final = 20
_MAX_WIDTH: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressState:
    """What is shown. Everything that is not known yet is ``None`` and shown as "-".

    Attributes:
        phase: In words: ``waiting``, ``connecting``, ``precopy``, ``stop-and-copy``, …
        elapsed_ms: Since the start.
        round_no: 0 = bulk; ``None`` before it.
        ram_bytes: Size of guest RAM.
        pages: Pages by class so far.
        wire_bytes: Bytes on the link so far.
        goodput_bps: Bytes per second the link carries now.
        remaining_bytes: Dirty guest RAM still to send, as QEMU says.
        round_bytes: What ``remaining_bytes`` was when the round began: the bar's full length.
            The display remembers it where it is not given.
        dirty_pages_per_s: Rate at which the guest dirties pages.
        expected_downtime_ms: If it were stopped now.
        downtime_limit_ms: What the user allows.
        codec: Codec in use.
        receiving: This is the destination, which knows only what arrived.
    """

    phase: str
    elapsed_ms: float = 0.0
    round_no: int | None = None
    ram_bytes: int | None = None
    pages: PageCounts = field(default_factory=PageCounts)
    wire_bytes: int = 0
    goodput_bps: float | None = None
    remaining_bytes: int | None = None
    round_bytes: int | None = None
    dirty_pages_per_s: float | None = None
    expected_downtime_ms: float | None = None
    downtime_limit_ms: float | None = None
    codec: str | None = None
    receiving: bool = False


def render(state: ProgressState, width: int) -> list[str]:
    """Draw the block: at most five lines, none longer than ``width`` columns."""
    width = min(max(width, _MIN_WIDTH), _MAX_WIDTH)
    lines = [_join(state.phase, _round_text(state), format_ms(state.elapsed_ms))]
    if state.round_no is not None and state.receiving:
        lines.append(_join(*_class_texts(state.pages)))
        lines.append(f"received {format_size(state.wire_bytes)}")
    elif state.round_no is not None:
        lines.append(_bar_line(state, width))
        lines.append(_join(*_class_texts(state.pages)))
        lines.append(
            _join(
                f"link {_or_dash(state.goodput_bps, format_rate)}",
                f"sent {format_size(state.wire_bytes)}",
                f"codec {state.codec or '-'}",
            )
        )
        lines.append(_join(*_convergence_texts(state)))
    return [line[:width] for line in lines]


def plain_line(state: ProgressState) -> str:
    """Say the same in one line, for logs."""
    parts = [format_ms(state.elapsed_ms), state.phase, _round_text(state)]
    if state.round_no is not None:
        way = "received" if state.receiving else "sent"
        parts.append(f"{format_size(state.wire_bytes)} {way}")
        if state.goodput_bps is not None:
            parts.append(format_rate(state.goodput_bps))
        if state.remaining_bytes is not None:
            parts.append(f"{format_size(state.remaining_bytes)} remaining")
        parts += _convergence_texts(state)
    return _join(*parts)


class ProgressDisplay:
    """Show progress on a stream.

    Not for several threads at once. After the stream failed once (closed terminal, broken pipe)
    everything here does nothing.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        quiet: bool = False,
        columns: Callable[[], int] | None = None,
    ) -> None:
        """Draw nothing yet.

        Args:
            stream: stderr.
            quiet: Show no progress; ``log`` still writes.
            columns: Asked for the terminal's width before each drawing; default asks the
                kernel.
        """
        self._stream = stream
        self._quiet = quiet
        self._columns = columns or self._terminal_columns
        self._terminal = stream.isatty()
        self._broken = False
        self._drawn_lines = 0
        self._pending: deque[str] = deque(maxlen=MAX_PENDING_LINES)
        self._shown_ns: int | None = None
        self._shown_key: tuple[str, int | None] | None = None
        self._round: tuple[int | None, int] = (None, 0)

    def update(self, state: ProgressState, now_ns: int) -> None:
        """Show a state, unless one was shown a moment ago. Call it as often as you like."""
        self._write_pending()
        if self._quiet or self._broken:
            return
        key = (state.phase, state.round_no)
        pause_ns = REDRAW_NS if self._terminal else PLAIN_LINE_NS
        recent = self._shown_ns is not None and now_ns - self._shown_ns < pause_ns
        if recent and key == self._shown_key:
            return
        if self._terminal:
            lines = render(self._with_round_bytes(state), self._columns() - 1)
            done = self._write(self._erase_text() + "".join(f"{line}\n" for line in lines))
            self._drawn_lines = len(lines) if done else self._drawn_lines
        else:
            done = self._write(plain_line(state) + "\n")
        if done:
            self._shown_ns, self._shown_key = now_ns, key

    def log(self, line: str) -> None:
        """Write a line that stays, above the block; ``update`` draws the block anew."""
        self._pending.append(line)
        self._write_pending()

    def close(self) -> None:
        """Erase the block, so that the summary stands in its place."""
        self._write_pending()
        if self._drawn_lines and self._write(self._erase_text()):
            self._drawn_lines = 0

    def _with_round_bytes(self, state: ProgressState) -> ProgressState:
        if state.round_bytes is not None or state.remaining_bytes is None:
            return state
        round_no, most_bytes = self._round
        same_round = round_no == state.round_no
        most_bytes = max(most_bytes if same_round else 0, state.remaining_bytes)
        self._round = (state.round_no, most_bytes)
        return replace(state, round_bytes=most_bytes)

    def _write_pending(self) -> None:
        if not self._pending:
            return
        text = "".join(f"{line}\n" for line in self._pending)
        if self._write(self._erase_text() + text):
            self._pending.clear()
            self._drawn_lines = 0
            self._shown_ns = None

    def _erase_text(self) -> str:
        # Up to the first line of the block, then clear to the end of the screen.
        return f"\x1b[{self._drawn_lines}F\x1b[J" if self._drawn_lines else ""

    def _write(self, text: str) -> bool:
        """Write if that does not block; ``False`` if it was not written."""
        if self._broken or not self._writable():
            return False
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._broken = True
            return False
        return True

    def _writable(self) -> bool:
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):
            # Not a file at all (a test, a capture): it cannot block.
            return True
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            return bool(poll.poll(0))
        except OSError:
            return False

    def _terminal_columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80


def _round_text(state: ProgressState) -> str:
    if state.round_no is None:
        return ""
    return "round 0 (bulk)" if state.round_no == 0 else f"round {state.round_no}"


def _bar_line(state: ProgressState, width: int) -> str:
    remaining = state.remaining_bytes
    if remaining is None or not state.round_bytes:
        return f"remaining {_or_dash(remaining, format_size)}"
    text = f" {format_size(remaining)} remaining"
    length = min(40, width - len(text))
    if length < 8:
        return text.strip()
    done = min(1.0, max(0.0, 1 - remaining / state.round_bytes))
    filled = int(done * length)
    return _BAR * filled + _BAR_REST * (length - filled) + text


def _class_texts(pages: PageCounts) -> list[str]:
    return [f"{name} {format_count(getattr(pages, name))}" for name in PAGE_CLASSES]


def _convergence_texts(state: ProgressState) -> list[str]:
    if state.receiving:
        return []
    if state.phase.startswith(("stop-and-copy", "handover")):  # perhaps without a link
        return ["the guest is stopped"]
    if not state.phase.startswith("precopy"):
        return []
    expected = f"downtime if stopped now {_or_dash(state.expected_downtime_ms, format_ms)}"
    if state.downtime_limit_ms is not None:
        expected += f" (limit {format_ms(state.downtime_limit_ms)})"
    # QEMU says 0 until it has measured, which takes it longer than the bulk round.
    dirty = state.dirty_pages_per_s or None
    return [expected, "" if dirty is None else f"dirtied {format_count(round(dirty))} pages/s"]


def _or_dash(value: float | None, print_value: Callable[[float], str]) -> str:
    return "-" if value is None else print_value(value)


def _join(*parts: str) -> str:
    return "  ".join(part for part in parts if part)
