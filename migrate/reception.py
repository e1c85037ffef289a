"""migrate-dst's door: it waits for a source and turns strangers away.

Whoever connects gets some time to introduce himself; the first that does it properly is the
source, and nobody who does not changes anything.
"""

import trio

from migrate.errors import PeerLostError, PeerProtocolError
from migrate.params import DestinationParams, LinkAddress
from migrate.session import Session
from migrate.transport.channels import LinkSocket
from migrate.transport.link import Link
from proto.link import messages
from proto.link.messages import Hello
from proto.link.session import LinkSession
from proto.link.state import Role
from proto.packing import clip_text

MAX_STRANGERS = 16
"""Connections that may be introducing themselves at a time."""

FAREWELL_S = 3.0


class Reception:
    """Accepts connections; the first that says HELLO is the source, later ones hear "busy".

    Attributes:
        waiting: Nobody has introduced himself yet: whoever does next is the source.
    """

    def __init__(self, params: DestinationParams, session: Session) -> None:
        self._params = params
        self._session = session
        self.waiting = True

    async def run(self, source: trio.MemorySendChannel[tuple[Link, Hello]]) -> None:
        """Listen until cancelled.

        Args:
            source: Where the source and its HELLO go; has room for them.

        Raises:
            ConnectError: The address cannot be listened on.
        """
        listener = await self._session.runtime.listen(self._params.listen, "migrate-src")
        try:
            self._session.enter("waiting for migrate-src")
            host, port = listener.getsockname()[:2]
            self._session.say(f"listening on {LinkAddress(host, port)} for migrate-src")
            limiter = trio.CapacityLimiter(MAX_STRANGERS)
            async with trio.open_nursery() as nursery:
                while True:
                    sock, peer = await listener.accept()
                    await limiter.acquire_on_behalf_of(sock)
                    nursery.start_soon(self._meet, sock, str(peer[0]), limiter, source)
        finally:
            listener.close()

    async def _meet(
        self,
        sock: LinkSocket,
        host: str,
        limiter: trio.CapacityLimiter,
        source: trio.MemorySendChannel[tuple[Link, Hello]],
    ) -> None:
        link = Link(sock, LinkSession(Role.DESTINATION), f"migrate-src at {host}")
        adopted = False
        try:
            with trio.move_on_after(self._params.hello_timeout_s):
                hello = await link.receive()
                if not isinstance(hello, Hello):
                    return
                if not self.waiting:
                    busy = "this migrate-dst takes in another guest already"
                    await link.try_send(messages.Refused("busy", busy))
                    return
                self.waiting, adopted = False, True
                source.send_nowait((link, hello))
        except (PeerLostError, PeerProtocolError) as error:
            self._session.say(f"turned away a connection from {host}: {error}")
            with trio.move_on_after(FAREWELL_S):
                await link.farewell(messages.Refused("protocol", clip_text(str(error))))
        finally:
            limiter.release_on_behalf_of(sock)
            if not adopted:
                link.close()
