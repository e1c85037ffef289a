"""``migrate-dst --recover``: run the guest that is ours, or make sure that it never runs here.

What the destination recorded decides. After COMMITTED the guest is ours: it goes on here. Without
it nobody ever may run this copy: ABORTED is recorded, the copy is ended, and then, if asked with
``--listen``, the source is told so. The record is locked meanwhile.
"""

import hmac

import trio

from migrate.door import Door
from migrate.errors import (
    GuestOn,
    PeerLostError,
    PeerProtocolError,
    QmpCommandError,
    QmpConnectError,
    RecoveryRefusedError,
)
from migrate.guests.base import Whereabouts
from migrate.params import LinkAddress
from migrate.qemu import queries
from migrate.qemu.qmp_client import QmpClient
from migrate.recovery.params import DestinationRecoveryParams
from migrate.recovery.qemu import KILL_S, give_settings_back, is_gone, kill, open_recorded
from migrate.recovery.run import Recovery
from migrate.session import Session
from migrate.state_file import ABORTED, COMMITTED, PREPARED, Record, RecordFacts, StateFile
from migrate.transport.guard import Guard
from migrate.transport.link import Link
from proto.link import messages
from proto.link.state import Role
from proto.packing import clip_text

FAREWELL_S = 3.0


class DestinationRecovery(Recovery):
    """One run of ``migrate-dst --recover``."""

    side = "destination"

    def __init__(self, params: DestinationRecoveryParams, session: Session) -> None:
        super().__init__(params.record, params.state_dir, session)
        self._params = params
        self._guard = Guard(Role.DESTINATION, params.security, session.runtime.random_bytes)
        self._told = trio.Event()

    async def _run(self, file: StateFile, record: Record) -> Whereabouts:
        self._guard.load()
        if record.state == COMMITTED:
            self._known = await self._resume(record.facts)
        else:
            self._known = await self._forgo(file, record)
        if self._params.listen is not None:
            await self._answer(file, self._params.listen)
        elif record.state != COMMITTED:
            number = record.facts.migration_id.hex()
            self._session.say(
                "to bring the guest back at the source, if it does not run there: "
                f"'migrate-src --recover {number}' on the source host, and with it this command "
                "with --listen HOST:PORT, if it has to ask"
            )
        return self._known

    # --- the guest is not ours ----------------------------------------------------------------

    async def _forgo(self, file: StateFile, record: Record) -> Whereabouts:
        """Nobody committed: make sure that this copy never runs."""
        if record.state == PREPARED:
            file.write(ABORTED, reason="recovered")
        done = await self._make_dead(record.facts)
        return Whereabouts(GuestOn.SOURCE, f"the guest was never the destination's: {done}")

    async def _make_dead(self, facts: RecordFacts) -> str:
        """End this copy.

        Raises:
            RecoveryRefusedError: It may still be there.
        """
        if facts.form == "incoming":
            return f"{facts.guest} got no complete guest"
        if is_gone(facts):
            return f"{facts.guest} has ended"
        if facts.form == "owned" and facts.process is not None and await kill(facts.process):
            return f"{facts.guest} is ended"
        try:
            async with open_recorded(facts, self._params.qmp) as client:
                await self._quit(client, facts)
        except (QmpConnectError, trio.TooSlowError) as error:
            which = f"process {facts.process.pid}" if facts.process else "it"
            raise RecoveryRefusedError(
                f"{facts.guest} may hold a complete, paused copy and cannot be told to quit "
                f"({str(error) or 'no answer'}): end {which}, never 'cont' it, then try again"
            ) from error
        return f"{facts.guest} was made to quit"

    async def _quit(self, client: QmpClient, facts: RecordFacts) -> None:
        state = await queries.query_run_state(client)
        if state.running:
            raise RecoveryRefusedError(
                f"{facts.guest} runs, and nothing says that it may: 'stop' it and find out who "
                "let it run; it must not run at the source as well"
            )
        with trio.fail_after(KILL_S):
            await queries.quit_qemu(client)
            await client.wait_peer_dead()

    # --- the guest is ours --------------------------------------------------------------------

    async def _resume(self, facts: RecordFacts) -> Whereabouts:
        """We committed: the guest goes on here as it was."""
        if facts.form == "incoming" and self._params.qmp is None:
            raise RecoveryRefusedError(
                f"the guest is the destination's, and {facts.guest} starts it by itself once it "
                "is complete; whether it is, only its monitor says: name it with --qmp SOCKET"
            )
        try:
            async with open_recorded(facts, self._params.qmp) as client:
                where = await self._run_as_before(client, facts)
                await give_settings_back(client, facts, self._session.warn)
                return where
        except RecoveryRefusedError as error:
            if error.guest_on is GuestOn.NEITHER:
                # It may have run here for a while; so nobody may resume another copy.
                error.guest_on = GuestOn.UNKNOWN
                error.args = (
                    f"the guest was the destination's, and {error}. If it did not run, or what "
                    "it did may be lost: 'migrate-src --recover "
                    f"{facts.migration_id.hex()} --destination-is-fenced' on the source host",
                )
            raise

    async def _run_as_before(self, client: QmpClient, facts: RecordFacts) -> Whereabouts:
        state = await queries.query_run_state(client)
        if state.status == queries.RUN_STATE_INCOMING:
            raise RecoveryRefusedError(
                f"the guest is the destination's, and {facts.guest} still waits for the end of "
                "it, which went with migrate-dst"
            )
        if not state.running and facts.run_state in {None, "running"}:
            state = await self._cont(client)
        what = "runs" if state.running else f"is not running: QEMU says '{state.status}'"
        text = f"the guest is on the destination and {what}; its monitor is {client.path}"
        return Whereabouts(GuestOn.DESTINATION, text, state.status)

    async def _cont(self, client: QmpClient) -> queries.RunState:
        step_s = self._params.timeouts.qemu_s
        try:
            with trio.move_on_after(step_s), client.listen("RESUME") as events:
                await queries.cont(client)
                await events.next()
                return await queries.query_run_state(client)
        except QmpCommandError as error:
            error.guest_on = GuestOn.DESTINATION
            raise
        raise RecoveryRefusedError(
            f"the QEMU at {client.path} did not say within {step_s:.0f} s that the guest runs"
        )

    # --- the source ---------------------------------------------------------------------------

    async def _answer(self, file: StateFile, address: LinkAddress) -> None:
        """Wait until the source has asked and acted."""
        async with trio.open_nursery() as nursery:

            async def introduced(link: Link, host: str) -> bool:
                if await self._is_source(link, file):
                    nursery.start_soon(self._tell, link, file)
                    return True
                return False

            door = Door(
                self._session,
                self._guard,
                listen=address,
                hello_timeout_s=self._params.hello_timeout_s,
                silence_s=self._params.timeouts.call_off_s,
                awaited="migrate-src --recover",
                introduced=introduced,
            )
            nursery.start_soon(door.run)
            await self._told.wait()
            nursery.cancel_scope.cancel()

    async def _is_source(self, link: Link, file: StateFile) -> bool:
        """Whether it asks for the migration that we know of; otherwise it is refused."""
        assert file.record is not None
        number = file.record.facts.migration_id
        refused: tuple[str, str]
        try:
            match await link.receive():
                case messages.Recover(asked) if hmac.compare_digest(asked, number):
                    return True
                case messages.Recover():
                    refused = "unknown-migration", "no record of that migration here"
                case _:
                    text = "this migrate-dst recovers a migration and takes in no guest"
                    refused = "recovering", text
        except PeerProtocolError as error:
            refused = "protocol", clip_text(str(error))
        with trio.move_on_after(FAREWELL_S):
            await link.farewell(messages.Refused(*refused))
        return False

    async def _tell(self, link: Link, file: StateFile) -> None:
        known, record = self._known, file.record
        assert known is not None
        assert record is not None
        here = known.guest_on is GuestOn.DESTINATION
        answer = messages.Recovered(
            state=record.state,
            guest_on="destination" if here else "source",
            run_state=known.run_state if here else None,
            message=clip_text(known.text),
        )
        try:
            await link.send(answer)
            self._session.say(f"told {link.peer}: {record.state}")
            # The source lets its guest go on meanwhile.
            with trio.move_on_after(self._params.timeouts.call_off_s):
                while (message := await link.receive()) is not None:
                    if isinstance(message, messages.Bye):
                        await link.try_send(messages.Bye())
                        self._finish(file)
                        return
        except (PeerLostError, PeerProtocolError) as error:
            self._session.say(f"it may ask again: {error}")
        finally:
            link.close()

    def _finish(self, file: StateFile) -> None:
        """The source knows. COMMITTED stays: a supervisor may be slow to see migrate-dst gone."""
        if file.state != COMMITTED:
            file.remove()
        self._told.set()
