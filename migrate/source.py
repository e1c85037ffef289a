"""migrate-src: run one migration from the source's side.

    guest (QMP or gateway) -> link, HELLO -> outbound pipeline -> handover

The phases live in their own modules; this one holds them together, watches the link and the guest
beside them, and makes sure that a failure before the point of no return leaves the guest running
here.
"""

import contextlib
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import trio

from migrate.ballooning import hinting
from migrate.checkpoint.source_side import SourceCopies
from migrate.connecting import open_link, open_stream
from migrate.encoding import PageEncoder
from migrate.errors import (
    GuestError,
    GuestOn,
    MigrationCancelledError,
    MigrationError,
    PeerLostError,
    PeerProtocolError,
    PeerRefusedError,
    RingsInconsistentError,
)
from migrate.guests.base import GuestProgress, SourceGuest, Whereabouts
from migrate.guests.gateway_source import GatewaySource
from migrate.handover import SourceHandover
from migrate.hello import Agreement, introduce, reported_commit
from migrate.hold import CommitHold
from migrate.joining import open_streams
from migrate.outbound import Outbound
from migrate.params import SourceParams, default_run_dir
from migrate.probe import MigrationPhases, Probe, open_probe
from migrate.reconnecting import Reconnector, SourcePatience
from migrate.recovery.advice import advise, source_advice
from migrate.recovery.record import begin_record
from migrate.report.progress import ProgressState
from migrate.report.report import Report
from migrate.ring_guard import SourceRingGuard
from migrate.sending import Sender
from migrate.session import ENDINGS, PROGRESS_S, Session, most_telling, told_or_bug
from migrate.source_guest import SourceOpener
from migrate.source_report import progress_state, source_report
from migrate.stalling import StallWatch
from migrate.transport.guard import Guard
from migrate.transport.link import Link
from migrate.way_back import WayBack
from proto.errors import QemuStreamError
from proto.guest_events import GuestEvent
from proto.link import messages
from proto.link.messages import Message
from proto.link.state import LinkState, Role
from proto.packing import clip_text
from proto.qemu.format import RP_SHUT
from proto.qemu.return_path import ReturnPathReader

FAREWELL_S = 3.0

WHERE_S = 1.0
"""The destination is told where the guest is then, if that is known by so much later."""


class SourceRun:
    """One run of migrate-src."""

    def __init__(self, params: SourceParams, session: Session) -> None:
        self._params = params
        self._session = session
        self._runtime = session.runtime
        self._guard = Guard(Role.SOURCE, params.security, self._runtime.random_bytes)
        self._handover: SourceHandover | None = None
        self._outbound: Outbound | None = None
        self._sender: Sender | None = None
        self._link: Link | None = None
        self._opening = trio.CancelScope()
        self._opened = False
        self._scope = trio.CancelScope()
        self._cancelled_by: str | None = None
        self._peer_left = trio.Event()
        self._peer_said_bye = False
        self._run_state: str | None = None
        self._probe = Probe(None, session.warn)
        self._opener = SourceOpener(params, session, self._may_run_there)
        self._copies = SourceCopies(params.checkpoint, params.vm_id, session)
        self._hold = CommitHold(session) if params.hold_before_commit else CommitHold(None)

    def cancel(self, why: str) -> None:
        """Call the migration off, from a signal."""
        self._cancelled_by = why
        (self._scope if self._opened else self._opening).cancel()

    async def run(self) -> tuple[Report, MigrationError | None]:
        """Migrate; never raises for what a migration can meet, but returns it with the report."""
        async with open_probe(self._params.probe, self._session.warn) as self._probe:
            report, error = await self._run()
            await self._probe.finish(report)
        return report, error

    async def _run(self) -> tuple[Report, MigrationError | None]:
        session = self._session
        error: MigrationError | None = None
        try:
            run_parent = default_run_dir(os.environ, os.getuid())
            with self._opening, self._runtime.private_dir(run_parent) as run_dir, self._hold:
                async with self._open_guest(run_dir) as guest:
                    self._opened = True
                    session.builder.report.source = guest.form
                    await self._migrate_or_call_off(guest)
            if self._opening.cancelled_caught:
                raise MigrationCancelledError(f"cancelled by {self._cancelled_by}")
        except ENDINGS as raised:
            error = most_telling(raised)
            if self._may_run_there() and error.guest_on is GuestOn.SOURCE:
                error.guest_on = GuestOn.UNKNOWN
            self._advise(error)
        report = source_report(
            session,
            self._link,
            self._outbound,
            self._handover,
            error,
            copies=self._copies,
            downtime_limit_ms=self._params.downtime_limit_ms,
        )
        if error is not None:
            report.guest_state = self._run_state
        return report, error

    def _advise(self, error: MigrationError) -> None:
        """Say what to type about a guest that runs nowhere, or nobody knows where."""
        if self._handover is not None:
            advice = source_advice(self._handover.state_file, self._params.security)
            self._session.builder.report.recovery = advise(error, advice)

    def _open_guest(self, run_dir: Path) -> AbstractAsyncContextManager[SourceGuest]:
        return self._opener.open(run_dir)

    async def _migrate_or_call_off(self, guest: SourceGuest) -> None:
        failure: BaseException | None = None
        try:
            with self._scope:
                await self._migrate(guest)
            if self._scope.cancelled_caught:
                raise MigrationCancelledError(f"cancelled by {self._cancelled_by}")
        except (Exception, BaseExceptionGroup) as raised:
            failure = raised
        try:
            if failure is not None:
                await self._after_failure(guest, failure)
        finally:
            self._copies.discard()
            if self._link is not None:
                self._link.close()

    async def _after_failure(self, guest: SourceGuest, failure: BaseException) -> None:
        """Call the migration off, or warn only if the guest is handed over already."""
        told, bug = told_or_bug(failure)
        error = await self._peers_reason(told)
        if self._finished():
            self._session.warn(f"after the guest was handed over: {error}")
        else:
            await self._call_off(guest, error)
        if bug is not None or not self._finished():
            raise (bug or error) from failure

    async def _call_off(self, guest: SourceGuest, error: MigrationError) -> None:
        """Leave the guest to the source, unless COMMIT was sent: then never."""
        handover = self._handover
        if handover is not None and self._may_run_there():
            error.guest_on = GuestOn.HANDED_OVER if handover.shut_relayed else GuestOn.UNKNOWN
            return
        known = trio.Event()
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._say_abort, error, known)
                where = await self._go_on(guest)  # at once: the guest may be standing still
                error.guest_on, self._run_state = where.guest_on, where.run_state
                known.set()
                self._session.say(where.text)
        if handover is not None and (where.guest_on is GuestOn.SOURCE or where.is_others):
            handover.state_file.remove()  # what it would recover is not, or no longer, ours

    def _may_run_there(self) -> bool:
        handover = self._handover
        return handover is not None and (handover.commit_sent or handover.shut_relayed)

    async def _go_on(self, guest: SourceGuest) -> Whereabouts:
        limit_s = self._params.timeouts.call_off_s
        with trio.move_on_after(limit_s):
            try:
                return await guest.go_on()
            except MigrationError as error:
                return Whereabouts(GuestOn.UNKNOWN, f"cannot bring the guest back: {error}")
        return Whereabouts(GuestOn.UNKNOWN, f"the guest is not back after {limit_s:.0f} s")

    async def _say_abort(self, error: MigrationError, known: trio.Event) -> None:
        if self._link is not None:
            with trio.move_on_after(WHERE_S):
                await known.wait()
            abort = messages.Abort(error.code, clip_text(str(error)), error.guest_on.value)
            with trio.move_on_after(FAREWELL_S):
                if self._link.session.resumable and not isinstance(error, PeerRefusedError):
                    await self._reconnector.bring_back()  # if it is down
                await self._link.farewell(abort)

    async def _peers_reason(self, error: MigrationError) -> MigrationError:
        """Why the connection was lost, if the destination said so before."""
        if self._link is not None and isinstance(error, PeerLostError):
            with trio.CancelScope(shield=True):
                if abort := await self._link.last_words():
                    return _gave_up(abort)
        return error

    # --- the migration ------------------------------------------------------------------------

    async def _migrate(self, guest: SourceGuest) -> None:
        session, params = self._session, self._params
        self._runtime.check_state_dir(params.state_dir)
        self._guard.load()
        facts = await guest.facts()
        if (ballooning := self._opener.ballooning) is not None:
            facts = ballooning.with_wish(facts)
        vm_id = await self._copies.identify(facts)
        session.builder.report.qemu_version = facts.qemu_version
        session.builder.report.free_page_hinting = hinting(facts)
        pending: list[GuestEvent] = []
        if isinstance(guest, GatewaySource):
            session.enter("waiting for the source QEMU")
            session.say(f"listening on {guest.uri} for the source QEMU's 'migrate {guest.uri}'")
            pending = await guest.wait_header()
        if self._probe.active:
            session.enter("watching the service")
            await self._probe.wait_before(params.probe_before_s)
        session.enter("connecting")
        link = self._link = await open_link(params, self._runtime, self._guard)
        open_one = partial(open_stream, params, self._runtime, self._guard)
        self._reconnector = Reconnector(link, open_one, self._wait_for(link))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reconnector.run)
            agreement = await introduce(
                link,
                guest,
                facts,
                self._runtime,
                cache_bytes=params.cache_bytes,
                relay=params.commit == "relay",
                vm_id=vm_id,
                streams=params.streams,
                needs_words=params.compress.mode == "words",
            )
            open_more = partial(open_streams, link, open_one)
            self._agreed(guest, agreement, await open_more())
            await self._carry(guest, link, agreement, pending, open_more)
            nursery.cancel_scope.cancel()

    def _wait_for(self, link: Link) -> SourcePatience:
        """Have the link survive its cuts, as long as this is better for the guest."""
        session, params = self._session, self._params
        patience = self._patience = SourcePatience(
            link.session,
            params.timeouts,
            self._runtime.now_ns,
            connect_s=params.connect_timeout_s,
            limit_ms=params.downtime_limit_ms,
        )
        link.gives_up, link.silence_s = patience.gives_up, patience.silence_s
        link.tell, link.trace = session.say, session.trace
        return patience

    def _agreed(self, guest: SourceGuest, agreement: Agreement, missing: list[str]) -> None:
        session = self._session
        if (ballooning := self._opener.ballooning) is not None:
            ballooning.agreed(agreement.kind)
        self._copies.expect(agreement)
        for warning in (*agreement.warnings, *agreement.not_checked, *missing):
            session.warn(warning)
        session.builder.report.not_checked += agreement.not_checked
        session.builder.report.commit = reported_commit(agreement.kind, guest.form)
        session.builder.report.landed = sorted(agreement.landed)

    def _begin_handover(
        self,
        guest: SourceGuest,
        link: Link,
        agreement: Agreement,
        control: trio.MemoryReceiveChannel[Message],
    ) -> SourceHandover:
        params = self._params
        runtime, ledger = self._runtime, self._session.ledger
        sender = self._sender = Sender(link, ledger, runtime, params.max_bandwidth_bps)
        outbound = self._outbound = Outbound(
            guest,
            sender,
            seed=agreement.seed,
            slot_count=agreement.slot_count,
            landed=agreement.landed,
            encoder=PageEncoder(
                params.compress, runtime, may_use_words=agreement.may_use_words
            ),
            runtime=runtime,
            rings=SourceRingGuard(
                guest,
                allow_inconsistent=params.allow_inconsistent_rings,
                warn=self._session.warn,
            ),
            copies=self._copies,
            warn=self._session.warn,
        )
        record = runtime.state_file(params.state_dir, "source", agreement.migration_id)
        begin_record(
            record, agreement, guest,
            peer=link.peer, link=params.to, was_running=guest.was_running,
        )  # fmt: skip
        return SourceHandover(
            guest=guest,
            link=link,
            control=control,
            outbound=outbound,
            kind=agreement.kind,
            state_file=record,
            runtime=runtime,
            timeouts=params.timeouts,
            hold=self._hold.wait if params.hold_before_commit else None,
        )

    async def _carry(
        self,
        guest: SourceGuest,
        link: Link,
        agreement: Agreement,
        pending: list[GuestEvent],
        open_more: Callable[[], Awaitable[list[str]]],
    ) -> None:
        """Carry the guest over and hand it over, watching link and guest beside it."""
        session = self._session
        to_control, control = trio.open_memory_channel[Message](64)
        handover = self._handover = self._begin_handover(guest, link, agreement, control)
        outbound = handover.outbound

        def stopped_ns() -> int | None:
            return guest.stopped_at_ns or outbound.state.switchover_at_ns

        self._patience.watch(handover, stopped_ns)
        way_back = WayBack(handover, session, open_more, agreed=agreement.may_turn_back)
        self._patience.turns_back = way_back.turns_back
        self._probe.follow(
            MigrationPhases(session.ledger, stopped_ns, lambda: handover.times.running_ns)
        )
        stalls = self._stall_watch(link, outbound)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.keep_alive)
            nursery.start_soon(self._receive, link, guest, to_control)
            if session.watched:
                nursery.start_soon(self._show_progress, guest)
            nursery.start_soon(stalls.watch_precopy)
            nursery.start_soon(stalls.watch_stop)
            nursery.start_soon(self._copies.run)
            if isinstance(guest, GatewaySource):
                nursery.start_soon(guest.refuse_more_connections)
            await self._copies.wait_announced()
            await outbound.rings.start()
            session.enter("precopy")
            session.builder.setup_done(self._runtime.now_ns())
            await guest.start()
            session.builder.report.local_channels = guest.local_channels
            nursery.start_soon(outbound.run, pending)
            await way_back.hand_over()
            session.enter("done")
            await self._farewell(guest, link)
            await self._copies.publish()
            nursery.cancel_scope.cancel()

    def _stall_watch(self, link: Link, outbound: Outbound) -> StallWatch:
        return StallWatch(
            link,
            outbound.sender,
            lambda: outbound.state.switchover_at_ns is not None,
            self._params.timeouts,
            self._params.max_bandwidth_bps,
        )

    async def _farewell(self, guest: SourceGuest, link: Link) -> None:
        """The guest is over there; nothing here may undo that, so nothing here fails."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(FAREWELL_S):
                await link.try_send(messages.Bye())
                await self._peer_left.wait()
            with trio.move_on_after(self._params.timeouts.qemu_s):
                await guest.finish(quit_guest=self._params.after == "quit")
            if self._peer_said_bye and self._handover is not None:
                self._handover.state_file.remove()

    async def _receive(
        self, link: Link, guest: SourceGuest, control: trio.MemorySendChannel[Message]
    ) -> None:
        """Read the link as long as the migration lasts."""
        try:
            await self._receive_all(link, guest, control)
        except PeerLostError:
            if not self._finished():
                raise
        finally:
            self._peer_left.set()

    async def _receive_all(
        self, link: Link, guest: SourceGuest, control: trio.MemorySendChannel[Message]
    ) -> None:
        return_path = ReturnPathReader()
        with control:
            while (message := await link.receive()) is not None:
                match message:
                    case messages.Ack():
                        assert self._sender is not None
                        self._sender.take_ack()
                    case messages.KeepAlive():
                        pass
                    case messages.OldCopy():
                        await self._copies.take(message)
                    case messages.Bye():
                        self._peer_said_bye = True
                        self._peer_left.set()
                    case messages.Abort():
                        if self._handover is None or not self._handover.commit_sent:
                            raise _gave_up(message)
                        await control.send(message)  # the commit knows what it means
                    case messages.ReturnPath(data):
                        await self._relay(guest, bytes(data), return_path)
                    case _:
                        await control.send(message)
        raise PeerLostError(f"{link.peer} left early")

    def _finished(self) -> bool:
        handover = self._handover
        return handover is not None and (handover.running is not None or handover.shut_relayed)

    async def _relay(
        self, guest: SourceGuest, data: bytes, return_path: ReturnPathReader
    ) -> None:
        handover = self._handover
        assert handover is not None
        try:
            shuts = [m.value for m in return_path.feed(data) if m.type == RP_SHUT]
        except QemuStreamError as error:
            raise PeerProtocolError(f"the destination QEMU's return path: {error}") from error
        # The link's state moves with the message itself; the handover may not have run since.
        if 0 in shuts and handover.link.session.state is not LinkState.VERIFIED:
            raise PeerProtocolError("the destination QEMU says SHUT before it was verified")
        await guest.answer(data)
        if 0 in shuts:
            handover.take_relayed_shut()
        elif shuts:
            raise GuestError("the destination QEMU reported that its load failed")

    # --- progress and report ------------------------------------------------------------------

    async def _show_progress(self, guest: SourceGuest) -> None:
        asked_at = 0.0
        known = GuestProgress()
        while True:
            if trio.current_time() - asked_at > 0.5:
                asked_at = trio.current_time()
                # progress is a nicety: what fails here shows elsewhere if it matters
                with trio.move_on_after(0.4), contextlib.suppress(MigrationError):
                    known = await guest.progress()
                    self._note_guest(known)
            self._session.show(self._progress_state(known))
            await trio.sleep(PROGRESS_S)

    def _note_guest(self, known: GuestProgress) -> None:
        outbound = self._outbound
        if outbound is not None and outbound.state.switchover_at_ns is None:
            outbound.sender.note_guest(known.dirty_pages_per_s, known.throttle_percent)
            if known.remaining_bytes is not None:
                outbound.note_remaining(known.remaining_bytes)

    def _progress_state(self, known: GuestProgress) -> ProgressState:
        limit_ms = self._params.downtime_limit_ms
        return progress_state(
            self._session, self._link, self._outbound, known, downtime_limit_ms=limit_ms
        )


def _gave_up(abort: messages.Abort) -> MigrationError:
    text, guest_on = f"the destination gave up: {abort.message}", GuestOn(abort.guest_on)
    if abort.code == RingsInconsistentError.code:
        return RingsInconsistentError.told(text, guest_on=guest_on)
    return PeerRefusedError(text, guest_on=guest_on)
