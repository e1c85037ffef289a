"""The link between migrate-src and migrate-dst: what passes, and over which connections.

It begins with one connection. Others join it, and when the link is down because one was lost,
``resume`` and ``take_resume`` give it another one. ``migrate.reconnecting`` is the source's way
back, ``migrate.reception`` the destination's.
"""

import contextlib
from collections.abc import Iterable

import trio

from migrate.errors import MigrationError, PeerLostError, PeerProtocolError
from migrate.transport.channels import Buffer
from migrate.transport.cuts import Cut
from migrate.transport.stream import LinkStream
from migrate.transport.stream_set import is_broken
from migrate.transport.traffic import Traffic
from proto.errors import RemoteProtocolError
from proto.link.frames import Frame, FrameType
from proto.link.messages import Abort, Joined, Message, Refused, Resume
from proto.link.strangers import LATER

LAST_WORDS_S = 0.5
"""They are in the socket's buffer already, or were never said."""


class Link(Traffic):
    """The connections to the other command. Any task may send, one task receives."""

    # --- further connections --------------------------------------------------------------------

    @property
    def stream(self) -> LinkStream:
        """The first connection."""
        return self._streams[0]

    async def first_if_later(self) -> Frame | None:
        """Destination: wait for the first frame of a new connection.

        Returns:
            It, if it is JOIN or RESUME: then the connection is for another link. None otherwise.
        """
        arrival = await self.stream.next()
        if isinstance(arrival, Frame) and arrival.frame_type in LATER:
            return arrival
        if arrival is not None:
            self.session.receive(arrival)
        return None

    async def join(self, stream: LinkStream, number: int) -> Refused | None:
        """Source: have a connection that was just opened join.

        Returns:
            Why the destination does not take it; None if it did and carries frames from now on.

        Raises:
            MigrationError: The connection broke in a way of its own, as TLS can.
            PeerLostError: It ended without an answer.
            PeerProtocolError: The answer is none. Neither concerns the migration.
        """
        stream.connection.number = number
        epoch = self._epoch
        if self.is_down or not self.session.may_send(FrameType.JOIN, number):
            raise PeerLostError(f"{self.peer} takes no further connections now")
        stream.write(self.session.send(self.session.join(number), number))
        answer: Joined | Refused | None = None
        try:
            frame = await stream.next()
            if not isinstance(frame, Frame):
                raise self._loss(stream) if is_broken(stream) else self._lost("it was closed")
            answer = self.session.take_answer(frame)
        except RemoteProtocolError as error:
            raise PeerProtocolError(f"{self.peer} broke the link protocol: {error}") from error
        finally:
            if not isinstance(answer, Joined):
                self._refused_bytes += stream.connection.received_bytes
        if isinstance(answer, Refused):
            return answer
        if self._epoch != epoch:
            raise self._lost("it came too late")
        self.add(stream)
        return None

    def admit(self, stream: LinkStream, number: int) -> None:
        """Destination: take a connection that the session has admitted."""
        stream.connection.number = number
        stream.write(self.session.send(Joined(), number))
        self.add(stream)

    # --- epochs ---------------------------------------------------------------------------------

    async def resume(self, stream: LinkStream) -> Refused | None:
        """Source: go on with a connection that was just opened.

        Returns:
            Why the destination does not go on; None if it does.

        Raises:
            MigrationError: The connection broke in a way of its own, as TLS can.
            PeerLostError: It ended without an answer.
            PeerProtocolError: The answer is none. None of them concerns the migration.
        """
        stream.write(self.session.open_with(self.session.resume()))
        frame = await stream.next()
        if not isinstance(frame, Frame):
            raise self._loss(stream) if is_broken(stream) else self._lost("it was closed")
        try:
            answer = self.session.take_resumed(frame)
        except RemoteProtocolError as error:
            raise PeerProtocolError(f"{self.peer} broke the link protocol: {error}") from error
        if isinstance(answer, Refused):
            self._refused_bytes += stream.connection.received_bytes
            return answer
        self._restore(stream, self.session.repeat())
        return None

    def greet_again(self, stream: LinkStream) -> None:
        """Source: begin again with a connection; the destination has never heard of us."""
        self._restore(stream, [self.session.greet_again()])

    def take_resume(self, stream: LinkStream, resume: Resume) -> Refused | None:
        """Destination: go on with a connection that said RESUME, if it may; else say why not.

        The connections of before are closed before the answer is on its way.
        """
        answer = self.session.admit_resume(resume)
        if isinstance(answer, Refused):
            return answer
        if self.outage is None:
            self._end_epoch(f"{self.peer} came back on another connection")
        self._restore(stream, [self.session.open_with(answer), *self.session.repeat()])
        return None

    def _restore(self, stream: LinkStream, first: Iterable[list[Buffer]]) -> None:
        outage = self.outage
        assert outage is not None, "a link that works is not restored"
        stream.connection.number = 0
        resent_bytes = self.session.sent_bytes["resent"] - self._resent_bytes
        self._resent_bytes += resent_bytes
        outage_s = trio.current_time() - outage.began_s
        self.cuts.add(Cut(outage.began_s, outage_s, resent_bytes, outage.cause))
        self.outage = self._over = None
        self._listened_at = trio.current_time()
        self.add(stream)
        for buffers in first:
            stream.write(buffers)
        self.tell(
            f"the link is back after {outage_s:.1f} s, {resent_bytes} bytes are sent again"
        )
        self.trace("link-back", outage_ms=outage_s * 1000, resent_bytes=resent_bytes)
        self._news.ring()

    # --- the end --------------------------------------------------------------------------------

    async def farewell(self, message: Message) -> None:
        """Say a last word, if it is legal, and wait until the peer has closed its end.

        The deadline is the caller's. Further connections end later: the last word comes first.
        """
        await self.try_send(message)
        self.gives_up = None
        if (first := self._streams.get(0)) is not None:
            first.end()
            await first.drain()

    async def last_words(self) -> Abort | None:
        """Look for the peer's ABORT in what arrived before the connection broke.

        Whoever sends notices a peer that left before anybody reads why it did.
        """
        self.gives_up = None
        with trio.move_on_after(LAST_WORDS_S), contextlib.suppress(PeerProtocolError):
            for _ in list(self._streams):  # the end of each may be what is heard first
                with contextlib.suppress(MigrationError):
                    while (message := await self.receive()) is not None:
                        if isinstance(message, Abort):
                            return message
                    return None
        return None

    def close(self) -> None:
        """Close all connections."""
        self.gives_up = None
        for stream in self._streams.values():
            stream.close()
