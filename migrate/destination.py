"""migrate-dst: take in one migration.

    guest (ours, attached, or waiting with -incoming) <- handover <- inbound pipeline <- link, HELLO

``migrate.reception`` waits for the source at the door.
"""

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import trio

from migrate.ballooning import give_back
from migrate.checkpoint.destination_side import DestinationCopies
from migrate.destination_guest import DISCARD_S, GuestOpener
from migrate.destination_report import destination_report, progress_state
from migrate.errors import (
    GuestError,
    GuestOn,
    MigrationCancelledError,
    MigrationError,
    PeerLostError,
    PeerRefusedError,
)
from migrate.guests.base import DestinationGuest
from migrate.handover import DestinationHandover
from migrate.hello import Agreement, answer_hello, reported_commit
from migrate.inbound import Inbound
from migrate.joining import end_joining
from migrate.params import DestinationParams
from migrate.reception import Reception
from migrate.recovery.advice import advise, destination_advice
from migrate.recovery.record import begin_record
from migrate.report.report import Report
from migrate.ring_guard import settle_verdict
from migrate.rings import RingVerdict
from migrate.session import ENDINGS, PROGRESS_S, Session, most_telling, told_or_bug
from migrate.state_file import ABORTED, StateFile
from migrate.transport.guard import Guard
from migrate.transport.link import Link
from migrate.units import NS_PER_MS
from proto.link import messages
from proto.link.dispatch import FRAMES
from proto.link.messages import CommitKind, Hello, Message
from proto.link.state import Role
from proto.packing import clip_text

FAREWELL_S = 3.0


class DestinationRun:
    """One run of migrate-dst."""

    def __init__(self, params: DestinationParams, session: Session) -> None:
        self._params = params
        self._session = session
        self._runtime = session.runtime
        self._opening = trio.CancelScope()
        self._opened = False
        self._scope = trio.CancelScope()
        self._cancelled_by: str | None = None
        self._link: Link | None = None
        self._agreement: Agreement | None = None
        self._inbound: Inbound | None = None
        self._handover: DestinationHandover | None = None
        self._state_file: StateFile | None = None
        self._opener = GuestOpener(params, session, self._has_committed)
        self._guard = Guard(Role.DESTINATION, params.security, self._runtime.random_bytes)
        self._source_left = trio.Event()
        self._source_said_bye = False
        self._source_gave_up = False
        self._source_done = False
        self._discarded = False
        self._reception = Reception(params, session, self._guard)
        self._copies = DestinationCopies(params.checkpoint, params.vm_id, session)

    @property
    def waits_for_source(self) -> bool:
        """Nobody has introduced itself yet: whoever does next is the source."""
        return self._reception.waiting

    def cancel(self, why: str) -> str | None:
        """Call the migration off, from a signal; of a simulated guest that is here, its life.

        Returns:
            What happens instead of the migration being called off.
        """
        if (simulated := self._opener.simulated) is not None:
            simulated.end()  # the migration may be done before it can be called off
            if self._has_committed():
                return "the simulated guest ends now"
        self._cancelled_by = why
        (self._scope if self._opened else self._opening).cancel()
        return None

    async def run(self) -> tuple[Report, MigrationError | None]:
        """Take a migration in; what can go wrong is returned with the report, not raised."""
        error: MigrationError | None = None
        try:
            self._runtime.check_state_dir(self._params.state_dir)
            self._guard.load()
            run_parent = self._params.run_dir
            with self._opening, self._runtime.private_dir(run_parent) as run_dir:
                async with self._open_guest(run_dir) as guest:
                    self._opened = True
                    self._session.builder.report.destination = guest.form
                    await self._take_in_or_discard(guest)
            if self._opening.cancelled_caught:
                raise MigrationCancelledError(f"cancelled by {self._cancelled_by}")
            await self._give_back()
        except ENDINGS as raised:
            error = most_telling(raised)
            error.guest_on = self._guest_on(error)
            if self._source_may_be_gone(error):
                error.guest_on = GuestOn.UNKNOWN
            else:
                self._advise(error)
        report = destination_report(
            self._session, self._link, self._inbound, self._handover, error
        )
        self._copies.tell(report)
        running_ns = self._handover.times.running_ns if self._handover is not None else None
        if error is None and self._opener.simulated is not None and running_ns is not None:
            # How long the guest is watched is no part of the migration.
            report.total_ms = (running_ns - self._session.started_ns) / NS_PER_MS
        return report, error

    async def _give_back(self) -> None:
        """Have the guest take back what it gave for its migration."""
        qemu = self._opener.qemu
        qmp = qemu.qmp_path if qemu is not None else self._params.qmp
        agreement = self._agreement
        if qmp is not None and agreement is not None and agreement.restore_balloon_bytes:
            await give_back(qmp, agreement.restore_balloon_bytes, self._session)

    def _advise(self, error: MigrationError) -> None:
        """Say what to type about a guest that runs nowhere, or nobody knows where."""
        agreement, number = self._agreement, None
        if agreement is not None and agreement.kind is not CommitKind.RELAYED:
            number = None if self._opener.simulated else agreement.migration_id
        advice = destination_advice(self._state_file, number, self._params.security)
        self._session.builder.report.recovery = advise(error, advice)

    def _source_may_be_gone(self, error: MigrationError) -> bool:
        """A simulated guest ends with its migrate-src, and of that nothing is heard any more.

        Not for the source's ears: if it lives, the guest is there.
        """
        lost = isinstance(error, PeerLostError) and error.guest_on is GuestOn.SOURCE
        return lost and self._opener.simulated is not None

    def _has_committed(self) -> bool:
        return self._handover is not None and self._handover.committed

    def _guest_on(self, error: MigrationError) -> GuestOn:
        """What this side knows of the guest after a failure."""
        handover = self._handover
        if handover is not None and handover.committed:
            return GuestOn.DESTINATION if handover.run_state else GuestOn.UNKNOWN
        if handover is not None and handover.given_back:
            return GuestOn.NEITHER
        if self._discarded and not self._source_gave_up:
            return GuestOn.SOURCE
        return error.guest_on

    def _open_guest(self, run_dir: Path) -> AbstractAsyncContextManager[DestinationGuest]:
        return self._opener.open(run_dir)

    async def _take_in_or_discard(self, guest: DestinationGuest) -> None:
        failure: BaseException | None = None
        try:
            with self._scope:
                await self._take_in(guest)
            if self._scope.cancelled_caught:
                raise MigrationCancelledError(f"cancelled by {self._cancelled_by}")
        except (Exception, BaseExceptionGroup) as raised:
            failure = raised
        try:
            if failure is not None:
                await self._after_failure(guest, failure)
        finally:
            if self._link is not None:
                self._link.close()

    async def _after_failure(self, guest: DestinationGuest, failure: BaseException) -> None:
        """Give the migration up, or warn only if the guest is here already."""
        told, bug = told_or_bug(failure)
        error = await self._peers_reason(told)
        arrived = self._handover is not None and self._handover.arrived
        if arrived:
            self._session.warn(f"after the guest was taken over: {error}")
            with trio.CancelScope(shield=True):
                await guest.keep()
        else:
            await self._discard(guest, error)
        if bug is not None or not arrived:
            raise (bug or error) from failure

    async def _discard(self, guest: DestinationGuest, error: MigrationError) -> None:
        """Give the migration up: record it, make this copy unable to run, tell the source."""
        handover = self._handover
        if handover is not None and (handover.committed or handover.given_back):
            return
        with trio.CancelScope(shield=True), trio.move_on_after(DISCARD_S):
            self._record_aborted(error)
            try:
                done = await guest.discard()
                self._discarded = True
            except GuestError as undead:
                error.guest_on = GuestOn.UNKNOWN
                done = str(undead)
            self._session.say(done)
            if self._source_done and self._opener.simulated is None:
                self._session.warn(
                    "the source had let its guest go; if it does not run there, 'cont' in the "
                    "source's monitor brings it back"
                )
            if self._link is not None:
                with trio.move_on_after(FAREWELL_S):
                    text = clip_text(str(error))
                    abort = messages.Abort(error.code, text, self._guest_on(error).value)
                    await self._link.farewell(abort)

    def _record_aborted(self, error: MigrationError) -> None:
        """Record that this copy will never run; it dies whether or not that can be recorded.

        Nobody will ask for a migration that the source cannot have committed.
        """
        if self._state_file is None:
            return
        if not self._source_may_have_committed():
            self._state_file.remove()
            return
        try:
            self._state_file.write(ABORTED, reason=error.code)
        except MigrationError as unrecorded:
            self._session.warn(str(unrecorded))

    async def _peers_reason(self, error: MigrationError) -> MigrationError:
        """Why the connection was lost, if the source said so before."""
        if self._link is not None and isinstance(error, PeerLostError):
            with trio.CancelScope(shield=True):
                if abort := await self._link.last_words():
                    self._source_gave_up = True
                    return _gave_up(abort)
        return error

    def _source_may_have_committed(self) -> bool:
        """From VERIFIED on the source may record COMMIT_SENT, until it says that it gives up."""
        handover = self._handover
        return handover is not None and handover.verified and not self._source_gave_up

    # --- the migration ------------------------------------------------------------------------

    async def _take_in(self, guest: DestinationGuest) -> None:
        session = self._session
        await self._copies.prepare(guest)
        async with trio.open_nursery() as nursery:
            to_us, sources = trio.open_memory_channel[tuple[Link, Hello]](1)
            nursery.start_soon(self._reception.run, to_us)
            link, hello = await sources.receive()
            self._link = link
            link.gives_up = self._gives_up
            link.tell, link.trace = session.say, session.trace
            session.builder.setup_done(self._runtime.now_ns())
            nursery.start_soon(link.keep_alive)  # the comparison may take its time
            old_pages = await self._copies.find(hello)
            welcomed = trio.Event()
            nursery.start_soon(self._copies.announce, link, welcomed)
            agreement = self._agreement = await answer_hello(
                link,
                hello,
                guest,
                self._runtime,
                cache_max_bytes=self._params.cache_max_bytes,
                old_pages=old_pages,
            )
            welcomed.set()
            nursery.start_soon(end_joining, link)
            for warning in (*agreement.warnings, *agreement.not_checked):
                session.warn(warning)
            session.builder.report.not_checked += agreement.not_checked
            session.builder.report.commit = reported_commit(agreement.kind, guest.form)
            session.builder.report.landed = sorted(agreement.landed)
            await self._carry(guest, link, agreement)
            nursery.cancel_scope.cancel()

    async def _carry(self, guest: DestinationGuest, link: Link, agreement: Agreement) -> None:
        record = self._state_file = self._opener.state_file or self._runtime.state_file(
            self._params.state_dir, "destination", agreement.migration_id
        )
        begin_record(record, agreement, guest, peer=link.peer, link=self._params.listen)
        to_control, control = trio.open_memory_channel[Message](64)
        inbound = self._inbound = Inbound(
            guest,
            link,
            seed=agreement.seed,
            slot_count=agreement.slot_count,
            ledger=self._session.ledger,
            runtime=self._runtime,
            old_pages=self._copies.pages,
        )
        handover = self._handover = DestinationHandover(
            guest=guest,
            link=link,
            control=control,
            inbound=inbound,
            kind=agreement.kind,
            state_file=record,
            runtime=self._runtime,
            settle_rings=self._settle_rings,
            timeouts=self._params.timeouts,
        )
        self._session.enter("precopy")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, link, to_control)
            if self._session.watched:
                nursery.start_soon(self._show_progress)
            nursery.start_soon(guest.watch)
            await inbound.wait_flowing()
            await guest.receive()
            self._session.builder.report.local_channels = guest.local_channels
            if agreement.kind is CommitKind.RELAYED:
                nursery.start_soon(self._relay, guest, link)
            await inbound.run()
            self._copies.stop_announcing()
            self._session.enter("handover")
            await handover.hand_over()
            self._session.enter("done")
            await self._farewell(guest, link)
            nursery.cancel_scope.cancel()

    async def _farewell(self, guest: DestinationGuest, link: Link) -> None:
        """The guest is here; its record may go once the source knows that too."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(FAREWELL_S):
                await link.try_send(messages.Bye())
                await self._source_left.wait()
            await guest.keep()
            if link.is_down:
                # The source may not know it yet; if it does not come back, this ends.
                await self._source_left.wait()
            if self._source_said_bye and self._state_file is not None:
                self._state_file.remove()
        if (qemu := self._opener.qemu) is not None:
            self._session.say(
                f"the guest's QEMU is process {qemu.pid}, its monitor is {qemu.qmp_path}, "
                f"its log {qemu.log_path}"
            )

    def _gives_up(self, down_s: float) -> bool:
        """Whether the source is no longer waited for, after so many seconds without a link."""
        timeouts = self._params.timeouts
        longest_s = timeouts.reconnect_s
        return down_s >= (
            min(timeouts.running_s, longest_s) if self._has_committed() else longest_s
        )

    def _settle_rings(self, verdict: RingVerdict) -> None:
        allow = self._params.allow_inconsistent_rings
        settle_verdict(verdict, allow_inconsistent=allow, warn=self._session.warn)

    async def _receive(self, link: Link, control: trio.MemorySendChannel[Message]) -> None:
        """Read the link as long as the migration lasts; never wait for the guest here."""
        try:
            await self._receive_all(link, control)
        except PeerLostError:
            if self._handover is None or not self._handover.committed:
                raise
        finally:
            self._source_left.set()

    async def _receive_all(self, link: Link, control: trio.MemorySendChannel[Message]) -> None:
        assert self._inbound is not None
        with control:
            while (message := await link.receive()) is not None:
                if FRAMES[message.frame_type].numbered:
                    self._inbound.take(message)
                    continue
                match message:
                    case messages.KeepAlive():
                        pass
                    case messages.Abort():
                        self._source_gave_up = True
                        raise _gave_up(message)
                    case messages.SourceDone():
                        self._source_done = True
                        await control.send(message)
                    case messages.Bye():
                        self._source_said_bye = True
                        self._source_left.set()
                    case _:
                        await control.send(message)

    async def _relay(self, guest: DestinationGuest, link: Link) -> None:
        """Pass the destination QEMU's return path on to the source."""
        try:
            while True:
                await link.send(messages.ReturnPath(await guest.relayed()))
        except trio.EndOfChannel:
            return

    # --- progress -------------------------------------------------------------------------------

    async def _show_progress(self) -> None:
        while True:
            self._session.show(progress_state(self._session, self._link, self._inbound))
            await trio.sleep(PROGRESS_S)


def _gave_up(abort: messages.Abort) -> PeerRefusedError:
    return PeerRefusedError(
        f"the source gave up: {abort.message}", guest_on=GuestOn(abort.guest_on)
    )
