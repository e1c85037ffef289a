"""The command ``inspect``: what a captured or live migration stream contains."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from migrate.errors import ParamsError
from migrate.lab.inspect_input import Input, open_input
from migrate.lab.inspect_json import survey_document
from migrate.lab.inspect_model import Block, Damage, Survey
from migrate.lab.inspect_pages import RamPages, SpooledPages, WantedPages
from migrate.lab.inspect_rings import (
    Rings,
    check_rings,
    decode_devices,
    memory_map,
    ring_pages,
    why_not_checked,
)
from migrate.lab.inspect_stream import NotAStreamError, StreamSurveyor
from migrate.lab.inspect_text import survey_lines
from migrate.units import format_rate, format_size
from proto.errors import CodecError

DAMAGED: Final = 1
INTERRUPTED: Final = 130
READER_GONE: Final = 141
REDRAW_S: Final = 0.2
CLEAR_LINE: Final = "\r\x1b[K"

DESCRIPTION: Final = """\
Print what a QEMU migration stream contains: machine type, RAM blocks, rounds with their pages,
sections, commands, devices, and the virtqueues of every virtio device, compared with the rings in
guest RAM.

The stream is one of
  FILE       a capture, e.g. of migrate "exec:cat > FILE"; packed with zstd or not
  unix:PATH  live: listens there for one migration; then say  migrate unix:PATH  to QEMU
  -          live: standard input
"""

EPILOG: Final = """\
Nobody takes the guest over. After  migrate unix:PATH  with the capability return-path the guest
goes on on the source, because nobody confirms the migration; without it QEMU believes that all
went well and leaves the guest stopped ('cont' lets it go on).

Where RAM is kept: a FILE is read a second time for the pages that rings lie in. Live input comes
only once; until its end all RAM is kept in a sparse temporary file without a name, which takes as
much disk as the guest has pages that are not zero (--spool says where; --no-rings needs none).

Exit status: 0 the whole stream was read; 1 it is damaged or cut off (all before that place is
printed); 2 it is no migration stream, or an option is wrong.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``inspect``."""
    add = parser.add_argument
    add("stream", metavar="FILE|unix:PATH|-", help="the stream")
    add("--json", action="store_true", help="print one JSON document instead of text")
    add(
        "--all", action="store_true", help="print every round and queue, however many there are"
    )
    add("--no-rings", action="store_true", help="do not compare virtqueues with guest RAM")
    add("--spool", metavar="DIR", type=Path, help="for live input: where RAM is kept meanwhile")
    add("--quiet", action="store_true", help="no progress on stderr")


class Stopper:
    """Lets a signal end the reading, but nothing else: what came is still read and printed.

    A second signal ends the program.
    """

    def __init__(self) -> None:
        self._waits = False
        self._asked = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM over in this block."""
        before = {
            number: signal.signal(number, self._ask)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        again, self._asked = self._asked, True
        if self._waits or again:
            raise KeyboardInterrupt

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for input in this block.

        Raises:
            KeyboardInterrupt: A signal came, now or before.
        """
        if self._asked:
            raise KeyboardInterrupt
        self._waits = True
        try:
            yield
        finally:
            self._waits = False


class Progress:
    """One line on stderr that says how far a live stream is."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._next_s = 0.0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self._quiet:
            clear = CLEAR_LINE if self._is_terminal else ""
            print(f"{clear}inspect: {text}", file=sys.stderr, flush=True)

    def show(self, survey: Survey, elapsed_s: float) -> None:
        """Draw the line anew from time to time; nothing where stderr is no terminal."""
        if self._quiet or not self._is_terminal or elapsed_s < self._next_s:
            return
        self._next_s = elapsed_s + REDRAW_S
        where = f"round {len(survey.rounds) - 1}" if survey.rounds else "header"
        if survey.device_state_offset_bytes is not None:
            where = "device state"
        rate = format_rate(survey.stream_bytes / elapsed_s) if elapsed_s else "-"
        text = f"{where}, {format_size(survey.stream_bytes)}, {rate}"
        print(f"{CLEAR_LINE}inspect: {text}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Remove the line."""
        if self._is_terminal and not self._quiet:
            print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


def read_stream(
    source: Input,
    sink_for: Callable[[list[Block]], RamPages | None] | None,
    progress: Progress,
    stopper: Stopper,
) -> Survey:
    """Read a stream to its end, to its damage, or until a signal.

    Raises:
        NotAStreamError: It begins like none.
    """
    is_live = source.kind != "file"
    surveyor = StreamSurveyor(sink_for, live=source.kind == "socket")
    survey = surveyor.survey
    started_s: float | None = None
    try:
        # What follows the end in a file is counted.
        while not surveyor.done or (source.kind == "file" and survey.damage is None):
            with stopper.waiting():
                count = source.readinto(surveyor.get_buffer())
            now_s = time.monotonic()
            if started_s is None:
                started_s = now_s
                if source.kind == "socket":
                    progress.say("connected")
            if is_live:
                surveyor.now_ms = (now_s - started_s) * 1000
                progress.show(survey, now_s - started_s)
            if not count:
                surveyor.feed_eof()
                break
            surveyor.buffer_updated(count)
    except (OSError, CodecError) as error:
        _cut(survey, "more bytes", str(error))
    except KeyboardInterrupt:
        _cut(survey, "more bytes", "an interruption by the user")
    progress.end()
    survey.not_shown += source.notes()
    return survey


def _cut(survey: Survey, expected: str, got: str) -> None:
    if survey.damage is None and not survey.complete:
        survey.damage = Damage(survey.stream_bytes, "input", expected, got)


def inspect_rings(
    name: str, survey: Survey, kept: SpooledPages | None, source: Input, stopper: Stopper
) -> Rings:
    """Decode the virtqueues and compare them with guest RAM.

    Args:
        name: The input; a file is read a second time.
        survey: What was found in it.
        kept: Guest RAM, where it was kept.
        source: The input as it was read.
        stopper: Ends the reading.
    """
    rings = decode_devices(survey)
    layout = memory_map(survey)
    rings.not_checked = why_not_checked(survey, layout)
    pages: RamPages | None = None
    if kept is not None and kept.failure is not None:
        rings.not_checked = f"guest RAM could not be kept: {kept.failure}"
    if not rings.not_checked and layout is not None:
        pages = kept
        if source.kind == "file" and any(device.virtqueues for device in rings.devices):
            wanted = WantedPages(ring_pages(rings, layout, survey.blocks))
            pages = wanted
            if not _read_again(name, survey, wanted, stopper):
                rings.not_checked, pages = "the file could not be read a second time", None
    check_rings(rings, layout, survey.blocks, pages)
    return rings


def _read_again(name: str, survey: Survey, wanted: WantedPages, stopper: Stopper) -> bool:
    """Read a file's pages; whether it still is what it was."""
    try:
        with open_input(name) as again:
            second = read_stream(again, lambda _: wanted, Progress(quiet=True), stopper)
    except (ParamsError, NotAStreamError):
        return False
    return second.stream_bytes == survey.stream_bytes


def run(options: argparse.Namespace) -> int:
    """Run ``inspect``; returns the exit status."""
    stopper = Stopper()
    try:
        with stopper.installed():
            return _inspect(options, stopper)
    except (NotAStreamError, ParamsError) as error:
        text = str(error)
        if isinstance(error, NotAStreamError):
            text = f"{options.stream} is not a migration stream: {error}"
        print(f"inspect: {text}", file=sys.stderr)
        return ParamsError.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever reads has seen enough; the interpreter must not complain at its end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except OSError as error:
        print(f"inspect: cannot write what was found: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DAMAGED


def _inspect(options: argparse.Namespace, stopper: Stopper) -> int:
    name: str = options.stream
    progress = Progress(quiet=options.quiet)
    kept: list[SpooledPages] = []

    def keep(blocks: list[Block]) -> SpooledPages:
        kept.append(stack.enter_context(closing(SpooledPages(blocks, options.spool))))
        return kept[-1]

    with ExitStack() as stack:
        with open_input(name) as source:
            if source.kind == "socket":
                progress.say(f"listening; now say to QEMU:  migrate {name}")
            wants_ram = source.kind != "file" and not options.no_rings
            survey = read_stream(source, keep if wants_ram else None, progress, stopper)
        if options.no_rings:
            rings = decode_devices(survey)
            rings.not_checked = "--no-rings"
            check_rings(rings, None, survey.blocks, None)
        else:
            rings = inspect_rings(name, survey, kept[-1] if kept else None, source, stopper)
    if options.json:
        document = survey_document(
            survey, rings, name=name, kind=source.kind, is_packed=source.is_packed
        )
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        for line in survey_lines(name, survey, rings, everything=options.all):
            print(line)
    sys.stdout.flush()
    return _verdict(survey)


def _verdict(survey: Survey) -> int:
    """Say on stderr what is wrong with the stream; returns the exit status."""
    if survey.damage is None:
        return 0
    print(f"inspect: damaged at {survey.damage.text()}", file=sys.stderr)
    return INTERRUPTED if "interruption" in survey.damage.got else DAMAGED
