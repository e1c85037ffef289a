"""Where connections come in: each passes the guard and has a little time to say what it wants.

Strangers cost a bounded amount of memory, time and lines on the screen, and cannot keep those who
are waited for out by coming first.
"""

import errno
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from migrate.errors import MigrationError
from migrate.params import LinkAddress
from migrate.session import Session
from migrate.transport.channels import (
    SPARED_DESCRIPTORS,
    LinkListener,
    LinkSocket,
    has_descriptors,
)
from migrate.transport.guard import Guard
from migrate.transport.link import Link
from migrate.transport.socket_stream import start_stream
from proto.link.session import LinkSession
from proto.link.state import Role

MAX_STRANGERS: Final = 16
"""Connections that may be introducing themselves at a time."""

MOST_LINES: Final = 16
"""Strangers that are each told of; later ones whenever their number has doubled."""

NO_ROOM_S: Final = 0.1
"""Until the next connection is tried to be accepted, when the host had no room for one."""

_NO_ROOM: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED}
"""Reasons not to accept a connection that pass; no migration under way may end for them."""


class Door:
    """Accepts connections until cancelled."""

    def __init__(
        self,
        session: Session,
        guard: Guard,
        *,
        listen: LinkAddress,
        hello_timeout_s: float,
        silence_s: float,
        awaited: str,
        introduced: Callable[[Link, str], Awaitable[bool]],
    ) -> None:
        """Accept nobody yet.

        Args:
            session: Of the run.
            guard: What every connection must pass.
            listen: Where.
            hello_timeout_s: How long a connection may take to introduce itself, guard included.
            silence_s: How long one that is kept may then say nothing.
            awaited: Who is waited for, for people.
            introduced: Given a link and the host it comes from, lets it introduce itself; returns
                whether the link is kept, by whoever took it. Its errors turn it away.
        """
        self._session = session
        self._guard = guard
        self._address = listen
        self._hello_timeout_s = hello_timeout_s
        self._silence_s = silence_s
        self._awaited = awaited
        self._introduced = introduced
        self._strangers: dict[trio.CancelScope, str] = {}
        self._turned_away = 0

    async def run(self) -> None:
        """Accept connections until cancelled.

        Raises:
            ConnectError: The address cannot be listened on.
        """
        session = self._session
        listener = await session.runtime.listen(self._address, self._awaited)
        try:
            session.enter(f"waiting for {self._awaited}")
            host, port = listener.getsockname()[:2]
            session.say(f"listening on {LinkAddress(host, port)} for {self._awaited}")
            if warning := self._guard.exposure(host):
                session.warn(warning)
            async with trio.open_nursery() as nursery:
                while True:
                    sock, host = await _accept(listener)
                    scope = trio.CancelScope()
                    self._make_room()
                    self._strangers[scope] = host
                    nursery.start_soon(self._meet, sock, host, scope)
        finally:
            listener.close()

    def _make_room(self) -> None:
        """Send a stranger away if there are too many: the oldest of the host that has most."""
        if len(self._strangers) < MAX_STRANGERS and has_descriptors(SPARED_DESCRIPTORS):
            return
        if not self._strangers:
            return
        ((busiest, _),) = Counter(self._strangers.values()).most_common(1)
        oldest = next(scope for scope, host in self._strangers.items() if host == busiest)
        del self._strangers[oldest]
        oldest.cancel()

    async def _meet(
        self,
        sock: LinkSocket,
        host: str,
        scope: trio.CancelScope,
    ) -> None:
        """Let a connection introduce itself; nothing that it does or meets may end the run."""
        used: LinkSocket | Link = sock
        adopted = False
        try:
            with scope, trio.move_on_after(self._hello_timeout_s) as patience:
                admitted = await self._guard.admit(sock, f"migrate-src at {host}")
                stream = start_stream(admitted, Role.DESTINATION)
                link = used = Link(
                    stream,
                    LinkSession(Role.DESTINATION),
                    f"migrate-src at {host}",
                    silence_s=self._silence_s,
                )
                adopted = await self._introduced(link, host)
            if scope.cancelled_caught:
                self.turned_away(host, "too many others came after it")
            elif patience.cancelled_caught:
                self.turned_away(host, "it did not introduce itself in time")
        except MigrationError as error:
            self.turned_away(host, str(error))
        finally:
            self._strangers.pop(scope, None)
            if not adopted:
                used.close()

    def turned_away(self, host: str, why: str) -> None:
        """Tell of a stranger; a flood of them must not fill a screen or a log."""
        self._turned_away += 1
        count = self._turned_away
        if count <= MOST_LINES or count & (count - 1) == 0:
            so_far = f" ({count} so far)" if count > MOST_LINES else ""
            self._session.say(f"turned away a connection from {host}: {why}{so_far}")


async def _accept(listener: LinkListener) -> tuple[LinkSocket, str]:
    """Wait for a connection, and for room for it; returns it and the host that it comes from."""
    while True:
        try:
            sock, peer = await listener.accept()
            return sock, str(peer[0])
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
        await trio.sleep(NO_ROOM_S)
