"""migrate-src's way back after a cut: other connections, and how long they are waited for."""

from collections.abc import Awaitable, Callable

import trio

from migrate.errors import MigrationError, PeerRefusedError
from migrate.handover import SourceHandover
from migrate.joining import open_streams
from migrate.timeouts import Timeouts
from migrate.transport.link import Link
from migrate.transport.stream import LinkStream
from proto.link.messages import Refused
from proto.link.session import LinkSession
from proto.link.state import JOINABLE, LinkState

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
"""Between two attempts: from one to the other, twice as long each time."""

HURRIED_PAUSE_S = 0.5
"""The longest while the guest stands still."""

LASTED_S = 1.0
"""After a link that lasted so long the first attempt is made at once."""

ATTEMPT_S = 5.0
"""From opening a connection to the answer; all of it takes some round trips."""

HURRIED_ATTEMPT_S = 1.5
SHORTEST_SILENCE_S = 2.0
"""Two keep-alives that did not come."""

PARTING_S = 3.0
"""How long one goes on trying when only last words are left to say."""


class SourcePatience:
    """How long the source waits for a link that is down, by what it would lose.

    Attributes:
        stopped_ns: When the guest was stopped for its switchover; None while it runs, and for one
            that a person had paused.
        turns_back: Asked once a guest has stood still for long enough: whether it goes on, and the
            link is waited for as if it had never been stopped.
    """

    def __init__(
        self,
        session: LinkSession,
        timeouts: Timeouts,
        now_ns: Callable[[], int],
        *,
        connect_s: float,
        limit_ms: int,
    ) -> None:
        """Begin before the first message.

        Args:
            session: Of the link.
            timeouts: How long is too long.
            now_ns: The clock of ``stopped_ns``.
            connect_s: How long the destination may take to be reached at all.
            limit_ms: Downtime that was asked for.
        """
        self._session = session
        self._timeouts = timeouts
        self._now_ns = now_ns
        self._connect_s = connect_s
        self._stopped_s = timeouts.stopped_wait_s(limit_ms)
        self.stopped_ns: Callable[[], int | None] = lambda: None
        self.turns_back: Callable[[], bool] = lambda: False
        self._handover: SourceHandover | None = None

    def watch(self, handover: SourceHandover, stopped_ns: Callable[[], int | None]) -> None:
        """Follow a handover from now on; ``stopped_ns`` of any guest, whoever stopped it."""
        guest = handover.guest

        def waiting_since_ns() -> int | None:
            return stopped_ns() if guest.was_running and not guest.paused_by_user else None

        self._handover = handover
        self.stopped_ns = waiting_since_ns

    @property
    def hurried(self) -> bool:
        """A guest stands still meanwhile, and nobody wants it to."""
        holding = self._handover is not None and self._handover.holding
        return self.stopped_ns() is not None and not holding

    def gives_up(self, down_s: float) -> bool:
        """Whether a link that has been down for so long is no longer waited for."""
        handover = self._handover
        if handover is not None and (handover.running is not None or handover.shut_relayed):
            return down_s >= PARTING_S
        if self._session.welcome is None:
            return down_s >= self._connect_s
        stopped_ns = self.stopped_ns()
        patient = handover is not None and (handover.commit_sent or handover.holding)
        if stopped_ns is None or patient:
            return down_s >= self._timeouts.reconnect_s
        stood_s = (self._now_ns() - stopped_ns) / 1e9
        if min(down_s, stood_s) < self._stopped_s:
            return False
        return down_s >= self._timeouts.reconnect_s or not self.turns_back()

    def silence_s(self) -> float:
        """How long a connection may say nothing: less where a guest waits for it."""
        if not self.hurried:
            return self._timeouts.peer_s
        return min(self._timeouts.peer_s, max(SHORTEST_SILENCE_S, self._stopped_s / 2))


class Reconnector:
    """Brings a link back whenever it is lost."""

    def __init__(
        self,
        link: Link,
        connect: Callable[[], Awaitable[LinkStream]],
        patience: SourcePatience,
    ) -> None:
        """Watch nothing yet.

        Args:
            link: The source's end.
            connect: Opens one connection, past the guard.
            patience: Knows whether a guest stands still meanwhile.
        """
        self._link = link
        self._connect = connect
        self._patience = patience
        self._greets = False

    async def run(self) -> None:
        """Run as a task, from the first connection on."""
        while True:
            async with trio.open_nursery() as nursery:
                if self._link.session.epoch:
                    nursery.start_soon(self._open_others)
                began = trio.current_time()
                await self._link.wait_down()
                nursery.cancel_scope.cancel()
            lasted = trio.current_time() - began >= LASTED_S
            await self.bring_back(0.0 if lasted else FIRST_PAUSE_S)

    async def bring_back(self, pause_s: float = 0.0) -> None:
        """Try until there is a link, or the destination does not go on; first after a pause.

        A refused connection is no reason to stop: a tunnel or proxy that comes back refuses, too.
        But a person may know that there is nobody any more.
        """
        told: set[str] = set()
        while self._link.is_down:
            await self._pause(pause_s)
            pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            hurried = self._patience.hurried
            outage = self._link.outage
            why = "no answer"
            try:
                with trio.move_on_after(HURRIED_ATTEMPT_S if hurried else ATTEMPT_S):
                    why = await self._attempt()
            except MigrationError as error:
                why = str(error)
            if outage is not None:
                outage.last_attempt = why
            if why and why not in told:
                told.add(why)
                self._link.tell(f"no link yet: {why}")
            await trio.lowlevel.checkpoint()

    async def _pause(self, pause_s: float) -> None:
        """Wait, but not for long from the moment on at which the guest stands still."""
        began = trio.current_time()
        until = began + pause_s
        while (now := trio.current_time()) < until:
            if self._patience.hurried:
                until = min(until, began + HURRIED_PAUSE_S)
            await trio.sleep_until(min(until, now + FIRST_PAUSE_S))

    async def _attempt(self) -> str:
        """Open a connection and go on with it; returns why not, empty if that went well."""
        link = self._link
        stream = await self._connect()
        refused: Refused | None = Refused("none", "")
        try:
            if self._greets:
                self._greets = False
                link.greet_again(stream)
                refused = None
            else:
                refused = await link.resume(stream)
        finally:
            if refused is not None:
                stream.close()
        if refused is None:
            return ""
        if refused.code == "unknown" and link.session.state is LinkState.GREETING:
            self._greets = True
        elif refused.code != "old":
            text = f"{link.peer} does not go on with the migration: {refused.message}"
            link.end(PeerRefusedError(text))
            await trio.sleep_forever()  # whoever receives ends the run
        return refused.message

    async def _open_others(self) -> None:
        """Have further connections join the new epoch; the link works without them."""
        session = self._link.session
        if session.welcome is not None and session.state in JOINABLE:
            await open_streams(self._link, self._connect)
