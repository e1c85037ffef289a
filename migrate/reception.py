"""Who of those that come to migrate-dst is the source: the first that says HELLO."""

from typing import Final

import trio

from migrate.door import Door
from migrate.errors import PeerLostError, PeerProtocolError
from migrate.params import DestinationParams
from migrate.session import Session
from migrate.transport.guard import Guard
from migrate.transport.link import Link
from proto.link import messages
from proto.link.messages import Hello
from proto.packing import clip_text

FAREWELL_S: Final = 3.0


class Reception:
    """Accepts connections for one run of migrate-dst.

    Attributes:
        waiting: Nobody has introduced himself yet: whoever does next is the source.
    """

    def __init__(self, params: DestinationParams, session: Session, guard: Guard) -> None:
        self._door = Door(
            session,
            guard,
            listen=params.listen,
            hello_timeout_s=params.hello_timeout_s,
            silence_s=params.timeouts.peer_s,
            awaited="migrate-src",
            introduced=self._introduced,
        )
        self._source: trio.MemorySendChannel[tuple[Link, Hello]] | None = None
        self.waiting = True

    async def run(self, source: trio.MemorySendChannel[tuple[Link, Hello]]) -> None:
        """Accept connections until cancelled; the source's goes to ``source``, once.

        Raises:
            ConnectError: The address cannot be listened on.
        """
        self._source = source
        await self._door.run()

    async def _introduced(self, link: Link, host: str) -> bool:
        """Whether this was the source; its link is the migration's from then on."""
        try:
            hello = await link.receive()
        except (PeerLostError, PeerProtocolError) as error:
            self._door.turned_away(host, str(error))
            refused = messages.Refused("protocol", clip_text(str(error)))
        else:
            if isinstance(hello, Hello) and self.waiting:
                assert self._source is not None, "run() comes first"
                self.waiting = False
                self._source.send_nowait((link, hello))
                return True
            refused = messages.Refused(*_BUSY[isinstance(hello, messages.Recover)])
        with trio.move_on_after(FAREWELL_S):
            await link.farewell(refused)
        return False


_BUSY: Final = {
    False: ("busy", "this migrate-dst takes in another guest already"),
    True: (
        "busy",
        "this migrate-dst takes in a guest and recovers none; ask when it has ended",
    ),
}
"""What is said to others, by whether they only ask."""
