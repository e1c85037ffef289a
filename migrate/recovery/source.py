"""``migrate-src --recover``: bring the guest back at the source if it may run there.

What the source recorded decides. Without COMMIT_SENT the guest is the source's. With it only the
destination knows, and says so over the link; or a person does, who made sure of it
(``--destination-is-fenced``). The record is locked meanwhile, so this may be started twice.

Whoever owns the source QEMU may have migrated the guest elsewhere since. So it goes on only behind
the migration that is recorded as ours, or on a person's word again.
"""

import contextlib

import trio

from migrate.errors import (
    ConnectError,
    GuestOn,
    MigrationError,
    PeerLostError,
    PeerProtocolError,
    PeerRefusedError,
    RecoveryRefusedError,
    TlsError,
    TokenError,
)
from migrate.guests.base import Whereabouts
from migrate.guests.source_state import answered, bring_back, wait_ended
from migrate.params import LinkAddress
from migrate.qemu.qmp_client import EventListener, QmpClient
from migrate.qemu.queries import MigrationStatus
from migrate.recovery.advice import asking_advice
from migrate.recovery.params import SourceRecoveryParams
from migrate.recovery.qemu import give_settings_back, open_recorded, visit_to_give_back
from migrate.recovery.run import Recovery
from migrate.session import Session
from migrate.state_file import COMMIT_SENT, KEPT, PREPARED, RETURNED, RUNNING, Record, StateFile
from migrate.transport.guard import Guard
from migrate.transport.link import Link
from migrate.transport.socket_stream import start_stream
from proto.link import messages
from proto.link.messages import Recovered
from proto.link.session import LinkSession
from proto.link.state import Role

CONNECT_AGAIN_S = 0.3
FAREWELL_S = 3.0

NO_ANSWER = (
    ConnectError,
    PeerLostError,
    PeerProtocolError,
    PeerRefusedError,
    TlsError,
    TokenError,
)
"""Nobody was asked: then nothing is known."""

ELSEWHERE = (
    "The guest has probably left by a migration that the owner of this QEMU began, and to go on "
    "here would make a second copy: look where it went ('info status' in the monitor there). If it "
    "is there, delete {path}. If no other copy of it runs, nor ever will, {insist}"
)

NOT_ENDED = (
    "Wait for its end, or end it ('migrate_cancel' in that QEMU's monitor), and try again; "
    "if it takes the guest elsewhere, delete {path}"
)

IS_BACK = ("ABORTED", "GIVEN_BACK")
"""What a destination recorded that never ran its copy and never will."""


class SourceRecovery(Recovery):
    """One run of ``migrate-src --recover``."""

    side = "source"

    def __init__(self, params: SourceRecoveryParams, session: Session) -> None:
        super().__init__(params.record, params.state_dir, session)
        self._params = params
        self._guard = Guard(Role.SOURCE, params.security, session.runtime.random_bytes)

    async def _run(self, file: StateFile, record: Record) -> Whereabouts:
        self._guard.load()
        if record.state == COMMIT_SENT:
            return await self._ask(file, record)
        if record.state == RUNNING:
            await self._give_settings_back(record)
            text = "the destination said that the guest goes on there"
            return Whereabouts(GuestOn.DESTINATION, text, record.facts.run_state)
        return await self._keep(file, record, fenced=self._params.fenced)

    async def _keep(
        self, file: StateFile, record: Record, *, fenced: bool = False
    ) -> Whereabouts:
        """The guest is ours: have it go on as it was, and forget the migration.

        Args:
            file: The record.
            record: What it says.
            fenced: A person says that there is no other copy, wherever QEMU's last migration went.

        Raises:
            RecoveryRefusedError: It does not go on here, or has probably left.
        """
        async with open_recorded(record.facts, self._params.qmp) as client:
            if record.state == PREPARED:
                file.write(KEPT)  # COMMIT was never sent, and never will be
            where = await self._bring_back(client, record, fenced=fenced)
            if where.guest_on is GuestOn.SOURCE and not where.is_others:
                await give_settings_back(client, record.facts, self._session.warn)
        if where.guest_on is not GuestOn.SOURCE or where.is_others:
            text = where.text
            if where.is_others:
                advice = NOT_ENDED if where.is_under_way else ELSEWHERE
                again = (
                    "type this again" if self._params.fenced else "add --destination-is-fenced"
                )
                text = f"{text}. {advice.format(path=file.path, insist=again)}"
            raise RecoveryRefusedError(text, guest_on=where.guest_on)
        file.remove()
        return where

    async def _give_settings_back(self, record: Record) -> None:
        """The source QEMU is done with; its owner may have another use for it."""
        await visit_to_give_back(record.facts, self._params.qmp, self._session.warn)

    async def _bring_back(
        self, client: QmpClient, record: Record, *, fenced: bool
    ) -> Whereabouts:
        facts, step_s = record.facts, self._params.timeouts.qemu_s

        def is_ours(status: MigrationStatus) -> bool:
            if facts.mark is not None and facts.mark.fits(status):
                return True
            if fenced:
                self._session.warn(
                    "a person said that no other copy of the guest runs, nor ever will; what it "
                    "did elsewhere, if it ran there, is lost"
                )
            return fenced

        async def ask(events: EventListener) -> Whereabouts:
            # Ours ends as soon as its stream is closed, so as its command dies.
            busy = await wait_ended(client, facts.guest, events, step_s / 2)
            return busy or await bring_back(
                client,
                facts.guest,
                events,
                was_running=facts.run_state in {None, "running"},
                is_ours=is_ours,
            )

        return await answered(client, facts.guest, step_s, ask)

    async def _ask(self, file: StateFile, record: Record) -> Whereabouts:
        """COMMIT may have arrived: only the destination knows, or a person."""
        if self._params.fenced:
            self._session.warn(
                "a person said that the destination's copy never runs again; what the guest did "
                "there, if it ran, is lost"
            )
            file.write(RETURNED, reason="fenced")
            assert file.record is not None
            return await self._keep(file, file.record)
        address = self._params.to or LinkAddress.parse(record.facts.link)
        link: Link | None = None
        try:
            link = await self._connect(address)
            answer = await self._question(link, record)
        except NO_ANSWER as error:
            if link is not None:
                link.close()
            raise RecoveryRefusedError(
                f"COMMIT was sent, and the destination does not say what became of it: {error}. "
                f"The guest is paused at the source and may run there: "
                f"{asking_advice(record, address, self._params.security)}"
            ) from error
        try:
            where = await self._act(file, answer)
            await self._farewell(link)
            return where
        finally:
            link.close()

    async def _act(self, file: StateFile, answer: Recovered) -> Whereabouts:
        if answer.guest_on == "destination":
            file.write(RUNNING, run_state=answer.run_state)
            assert file.record is not None
            await self._give_settings_back(file.record)
            file.remove()
            text = f"the guest is on the destination: {answer.message}"
            return Whereabouts(GuestOn.DESTINATION, text, answer.run_state)
        if answer.state in IS_BACK and answer.guest_on == "source":
            self._session.say(f"the destination says: {answer.message}")
            file.write(RETURNED, reason=answer.state)
            assert file.record is not None
            return await self._keep(file, file.record)
        raise RecoveryRefusedError(
            f"the destination recorded {answer.state} and cannot say where the guest is: "
            f"{answer.message}"
        )

    # --- the other command --------------------------------------------------------------------

    async def _connect(self, address: LinkAddress) -> Link:
        """Connect, and try again for a while: both sides may be started at once.

        Raises:
            ConnectError: Nobody listens there.
        """
        self._session.enter("asking the destination")
        runtime = self._session.runtime
        peer = f"migrate-dst at {address}"
        deadline = trio.current_time() + self._params.connect_timeout_s
        with trio.move_on_at(deadline):
            while True:
                try:
                    sock = await runtime.connect(address, "migrate-dst --recover")
                    sock = await self._guard.enter(sock, address, peer)
                    stream = start_stream(sock, Role.SOURCE)
                    silence_s = self._params.timeouts.peer_s
                    return Link(stream, LinkSession(Role.SOURCE), peer, silence_s=silence_s)
                except ConnectError:
                    if trio.current_time() + CONNECT_AGAIN_S > deadline:
                        raise
                await trio.sleep(CONNECT_AGAIN_S)
        raise ConnectError(f"migrate-dst --recover at {address} does not answer")

    async def _question(self, link: Link, record: Record) -> Recovered:
        """Ask; raises ``PeerLostError`` or ``PeerRefusedError`` where there is no answer."""
        number = record.facts.migration_id
        timeout_s = self._params.timeouts.peer_s
        with trio.move_on_after(timeout_s):
            await link.send(messages.Recover(number, b"", record.state))
            match await link.receive():
                case messages.Recovered() as answer:
                    return answer
                case messages.Refused(_, text):
                    raise PeerRefusedError(f"{link.peer} refused: {text}")
                case _:
                    raise PeerLostError(f"{link.peer} closed the connection")
        raise PeerLostError(f"{link.peer} did not answer within {timeout_s:.0f} s")

    async def _farewell(self, link: Link) -> None:
        """Say that we have acted: the destination may forget it."""
        with trio.move_on_after(FAREWELL_S), contextlib.suppress(MigrationError):
            await link.send(messages.Bye())
            await link.receive()
