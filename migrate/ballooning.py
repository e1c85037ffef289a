"""``migrate-src --balloon``: the guest gives memory back for its migration, and gets it again.

The source asks for it before anything else and says in HELLO (in the machine's facts) what the
guest had; a migrate-dst that commands its QEMU asks for that again when the guest runs there, and
where the migration fails migrate-src does on its side. Both open the monitor by themselves, before
and after the migration: it serves one client at a time.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import trio

from migrate.errors import GuestError, QmpCommandError
from migrate.guests.base import Facts
from migrate.guests.simulated_facts import is_simulated
from migrate.qemu import balloon, queries
from migrate.qemu.machine_facts import RESTORE_BALLOON, MachineFacts
from migrate.qemu.qmp_client import QmpClient, open_qmp
from migrate.report.report import BalloonReport
from migrate.session import Session
from migrate.units import format_count, format_ms, format_size
from proto.guest_events import PAGE_SIZE
from proto.link.messages import CommitKind

RESTORE_S: Final = 10.0
"""Asking takes milliseconds, whatever the guest does then."""


class Ballooning:
    """What became of ``--balloon``, from the source's side."""

    def __init__(self, session: Session, *, wanted_bytes: int) -> None:
        self._session = session
        self._wanted_bytes = -(-wanted_bytes // PAGE_SIZE) * PAGE_SIZE
        self._had_bytes: int | None = None
        self._kind: CommitKind | None = None

    async def shrink(self, client: QmpClient) -> None:
        """Have the guest keep no more than was wanted; a guest that can't is told of and left.

        Raises:
            QmpInterruptedError: The QEMU is gone.
        """
        if reason := await self._why_not(client):
            self._session.warn(f"--balloon does nothing: {reason}")
            return
        session, started_ns = self._session, self._session.runtime.now_ns()
        session.enter("ballooning")
        had_bytes = self._had_bytes = await balloon.query_kept_bytes(client)
        kept_bytes = await balloon.shrink_to(client, self._wanted_bytes)
        report = session.builder.report.balloon = BalloonReport(
            asked_bytes=self._wanted_bytes,
            before_bytes=had_bytes,
            kept_bytes=kept_bytes,
            pages=max(0, had_bytes - kept_bytes) // PAGE_SIZE,
            shrink_ms=(session.runtime.now_ns() - started_ns) / 1e6,
        )
        text = (
            f"balloon: the guest had {format_size(had_bytes)} and keeps {format_size(kept_bytes)} "
            f"for its migration ({format_count(report.pages)} pages given in "
            f"{format_ms(report.shrink_ms or 0)})"
        )
        session.say(text)
        if kept_bytes > self._wanted_bytes:
            session.warn(
                f"the guest's balloon driver gives no more: it keeps {format_size(kept_bytes)}, "
                f"--balloon wanted {format_size(self._wanted_bytes)}"
            )

    async def _why_not(self, client: QmpClient) -> str | None:
        if not (await queries.query_migrate(client)).has_ended:
            return "the guest is migrating already"
        if not (await queries.query_run_state(client)).running:
            return "the guest is paused, so its driver cannot give memory back"
        try:
            kept_bytes = await balloon.query_kept_bytes(client)
        except QmpCommandError as error:
            return f"the machine has no balloon device ({error.desc})"
        device = await balloon.find_balloon(client)
        if device is not None and not device.driver:
            return "the guest has no driver for its balloon device"
        if kept_bytes <= self._wanted_bytes:
            return f"the guest has only {format_size(kept_bytes)}"
        return None

    def with_wish(self, facts: Facts) -> Facts:
        """Add to the machine's facts what the guest is to have again."""
        if self._had_bytes is None or facts.machine is None:
            return facts
        return replace(facts, machine={**facts.machine, RESTORE_BALLOON: self._had_bytes})

    def agreed(self, kind: CommitKind) -> None:
        """Remember who commits: only who commands the destination QEMU can ask it anything."""
        self._kind = kind

    async def restore_here(self, qmp: Path) -> None:
        """Ask for what the guest had before: it stayed at the source."""
        if self._had_bytes is not None:
            report = self._session.builder.report.balloon or BalloonReport()
            if await _ask(qmp, self._had_bytes, self._session):
                report.restored_on = "source"
            self._session.builder.report.balloon = report

    def left(self) -> None:
        """The guest is at the destination: who gives it its memory there?"""
        report = self._session.builder.report.balloon
        if self._had_bytes is None or report is None:
            return
        if self._kind is CommitKind.HELD:
            report.restored_on = "destination"
            return
        self._session.warn(
            f"the guest's balloon stays at {format_size(report.kept_bytes or 0)}: "
            f"'{balloon.monitor_words(self._had_bytes)}' in the destination QEMU's monitor gives "
            "it its memory back"
        )


def hinting(facts: Facts) -> bool | None:
    """Whether the guest will tell its QEMU which pages it does not use; ``None`` = not known."""
    if facts.machine is None or is_simulated(facts.machine):
        return None
    device = MachineFacts.from_dict(facts.machine).balloon
    return None if device is None else device.hinting


@asynccontextmanager
async def ballooned(
    qmp: Path, wanted_bytes: int | None, session: Session, handed_over: Callable[[], bool]
) -> AsyncIterator[Ballooning | None]:
    """Have a guest give memory back for the block; it gets it again if the block fails.

    Args:
        qmp: Its QEMU's monitor; nobody else may have it open at either end of the block.
        wanted_bytes: What it is to keep; ``None`` = nobody asks it for anything.
        session: Who is told.
        handed_over: Whether a guest that was being migrated may run elsewhere.
    """
    if wanted_bytes is None:
        yield None
        return
    ballooning = Ballooning(session, wanted_bytes=wanted_bytes)
    try:
        async with open_qmp(qmp) as client:
            await ballooning.shrink(client)
        yield ballooning
    except BaseException:
        if not handed_over():
            with trio.move_on_after(RESTORE_S, shield=True):
                await ballooning.restore_here(qmp)
        raise
    ballooning.left()


async def give_back(qmp: Path, n_bytes: int, session: Session) -> None:
    """Destination: ask for what the guest had before its migration."""
    report = session.builder.report.balloon = BalloonReport(before_bytes=n_bytes)
    if await _ask(qmp, n_bytes, session):
        report.restored_on = "destination"


async def _ask(qmp: Path, n_bytes: int, session: Session) -> bool:
    asked = False
    reason = f"no answer within {RESTORE_S:.0f} s"
    with trio.move_on_after(RESTORE_S):
        try:
            async with open_qmp(qmp) as client:
                await balloon.ask_to_keep(client, n_bytes)
                asked = True
        except GuestError as error:
            reason = str(error)
    if asked:
        session.say(f"balloon: the guest may have {format_size(n_bytes)} again")
    else:
        session.warn(
            f"the guest was not given its memory back ({reason}): "
            f"'{balloon.monitor_words(n_bytes)}' in the monitor of {qmp} does it"
        )
    return asked
