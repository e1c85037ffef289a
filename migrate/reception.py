"""Who of those that come to migrate-dst is the source: the first that says HELLO.

A connection that says JOIN, with the token that the source was given, is a further one of its link.
"""

from typing import Final

import trio

from migrate.door import Door
from migrate.errors import PeerLostError, PeerProtocolError
from migrate.params import DestinationParams
from migrate.session import Session
from migrate.transport.guard import Guard
from migrate.transport.link import Link
from migrate.transport.stream import LinkStream
from proto.errors import RemoteProtocolError
from proto.link import messages
from proto.link.frames import Frame
from proto.link.messages import Hello, Join, Refused, Resume
from proto.link.strangers import UNKNOWN, decode_later, refusal
from proto.packing import clip_text

FAREWELL_S: Final = 3.0


class Reception:
    """Accepts connections for one run of migrate-dst."""

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
        self._link: Link | None = None

    @property
    def waiting(self) -> bool:
        """Nobody has introduced himself yet: whoever does next is the source."""
        return self._link is None

    async def run(self, source: trio.MemorySendChannel[tuple[Link, Hello]]) -> None:
        """Accept connections until cancelled; the source's goes to ``source``, once.

        Raises:
            ConnectError: The address cannot be listened on.
        """
        self._source = source
        await self._door.run()

    async def _introduced(self, link: Link, host: str) -> bool:
        """Hear who it is; whether the connection is the migration's from then on."""
        if (frame := await link.first_if_later()) is not None:
            return await self._came_later(link, frame, host)
        try:
            hello = await link.receive()
        except (PeerLostError, PeerProtocolError) as error:
            self._door.turned_away(host, str(error))
            refused = messages.Refused("protocol", clip_text(str(error)))
        else:
            if isinstance(hello, Hello) and self.waiting:
                assert self._source is not None, "run() comes first"
                self._link = link
                self._source.send_nowait((link, hello))
                return True
            refused = messages.Refused(*_BUSY[isinstance(hello, messages.Recover)])
        with trio.move_on_after(FAREWELL_S):
            await link.farewell(refused)
        return False

    async def _came_later(self, stray: Link, frame: Frame, host: str) -> bool:
        """Take a further connection of the source's, or the first of an epoch; or say why not."""
        try:
            refused = self._judge(stray.stream, decode_later(frame))
        except RemoteProtocolError as error:
            refused = Refused("protocol", clip_text(str(error)))
        if refused is None:
            return True
        self._door.turned_away(host, refused.message)
        with trio.move_on_after(FAREWELL_S):
            stray.stream.write(refusal(refused))
            await stray.stream.flush()
            stray.stream.end()
            await stray.stream.drain()
        return False

    def _judge(self, stream: LinkStream, message: Join | Resume) -> Refused | None:
        """Why a connection is not taken; None if it is the migration's from now on."""
        link = self._link
        if link is None:
            return UNKNOWN
        if isinstance(message, Resume):
            return link.take_resume(stream, message)
        if link.is_down:
            return Refused("late", "the link is lost")
        answer = link.session.admit(message)
        if isinstance(answer, Refused):
            return answer
        link.admit(stream, message.connection)
        return None


_BUSY: Final = {
    False: ("busy", "this migrate-dst takes in another guest already"),
    True: (
        "busy",
        "this migrate-dst takes in a guest and recovers none; ask when it has ended",
    ),
}
"""What is said to others, by whether they only ask."""
