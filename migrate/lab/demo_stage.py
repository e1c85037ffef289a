"""What both demos have in common: how they tell, how they start migrate-src, how they end."""

import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from migrate.lab.commands import Command
from migrate.session import most_telling

END_BY_ITSELF_S: Final = 2.0
"""A Ctrl-C reaches migrate-src too; a second signal would cut its clean end short."""

COLUMNS: Final = 78
BANDWIDTH: Final = "400Mbit"

DemoBody = Callable[[Path, Sequence[str]], Awaitable[int]]
"""A demo: given an empty folder with a short path and options for migrate-src, its exit code."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the proof."""

    name: str
    good: bool
    text: str


def run_demo(demo: DemoBody, folder: Path, source_options: Sequence[str]) -> int:
    """Run a demo to its end, or to a signal's; returns the exit code.

    Raises:
        MigrationError: What went wrong, the most telling of it.
    """
    try:
        return trio.run(_until_signal, demo, folder, source_options)
    except (trio.TooSlowError, BaseExceptionGroup) as error:
        raise most_telling(error) from error


async def _until_signal(demo: DemoBody, folder: Path, source_options: Sequence[str]) -> int:
    """Let SIGTERM and a closed terminal end the demo as cleanly as Ctrl-C does."""
    status = 128 + signal.SIGTERM
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
                await anext(signals)
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        status = await demo(folder, source_options)
        nursery.cancel_scope.cancel()
    return status


async def run_source(way: Sequence[str], options: Sequence[str], *hidden: str) -> int:
    """Run migrate-src on our own output, so that its display is what people see.

    Args:
        way: Where from and where to.
        options: What the user adds; without a limit among them the link gets one.
        hidden: More options, which are not worth showing.
    """
    limited = any(word.startswith("--max-bandwidth") for word in options)
    limits = options if limited else ("--max-bandwidth", BANDWIDTH, *options)
    show("migrate-src", *way, shown=limits)
    say()
    program = Path(sys.executable).with_name("migrate-src")
    done = await trio.run_process(
        [str(program), *way, *limits, *hidden],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        check=False,
        deliver_cancel=_end_source,
    )
    return done.returncode


async def _end_source(process: trio.Process) -> None:
    await trio.sleep(END_BY_ITSELF_S)
    process.terminate()


async def tell_failure(command: Command) -> None:
    """Let migrate-dst end, which need not know yet, and show what it said."""
    with trio.move_on_after(END_BY_ITSELF_S) as waiting:
        await command.process.wait()
    if waiting.cancelled_caught:
        command.process.terminate()
        with trio.move_on_after(END_BY_ITSELF_S):
            await command.process.wait()
    step("The migration failed. What migrate-dst said:")
    for line in command.lines:
        say(f"   {line}")


def judge(facts: Sequence[Fact], end: str) -> int:
    """Print the proof and its result; returns 0 only if all of it holds."""
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        head = f"   {'ok    ' if fact.good else 'FAILED'}  {fact.name:<{width}}  "
        blank = " " * len(head)
        say(_filled(fact.text, head, blank))
    good = all(fact.good for fact in facts)
    say()
    tell(f"The guest arrived whole. {end}" if good else "The guest did NOT arrive whole.")
    return 0 if good else 1


def show(program: str, *words: str, shown: Sequence[str]) -> None:
    """Show a command line on two lines; the second may hold what is no word of it."""
    say(f"   $ {program} {shlex.join(words)} \\")
    say(f"       {' '.join(shown)}")


def step(text: str) -> None:
    """Begin a step."""
    say()
    say(_filled(text, "", "   "))


def tell(text: str, *, indent: int = 0) -> None:
    """Print a paragraph."""
    blank = " " * indent
    say(_filled(text, blank, blank))


def say(line: str = "") -> None:
    """Print at once: migrate-src writes to the same output."""
    print(line, flush=True)


def _filled(text: str, first_indent: str, indent: str) -> str:
    return textwrap.fill(
        text,
        COLUMNS,
        initial_indent=first_indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
