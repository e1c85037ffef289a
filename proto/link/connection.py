"""One connection of a link: a stream of bytes on one side, frames on the other. No I/O.

Theory of operation. Received bytes go in through ``get_buffer`` and ``buffer_updated``; what they
are comes out of ``next_arrival`` until ``NEED_DATA``. Nothing here knows what a frame means, nor
shares anything with the session it belongs to: a thread of its own may read a connection while
the session works on what came before.
"""

from proto.errors import FrameError
from proto.guest_events import NEED_DATA, NeedData
from proto.link.dispatch import FROM_DESTINATION, FROM_SOURCE
from proto.link.frames import EndOfFrames, Frame, FrameDecoder
from proto.link.state import Role

Arrival = Frame | EndOfFrames | FrameError
"""What comes of a connection; the last two come once, last."""


class LinkConnection:
    """The receiving half of one end of a connection.

    Attributes:
        received_bytes: Bytes that arrived, including those of unfinished frames.
        ended: The last arrival was taken.
    """

    def __init__(self, role: Role, number: int = 0) -> None:
        """Begin before the first byte.

        Args:
            role: Which end this is.
            number: 0 for the connection that carries HELLO, its place among all for another.
        """
        self.received_bytes = 0
        self.ended = False
        self._decoder = FrameDecoder(
            FROM_DESTINATION if role is Role.SOURCE else FROM_SOURCE, number
        )

    @property
    def number(self) -> int:
        """Its place among the connections of the link."""
        return self._decoder.connection

    @number.setter
    def number(self, number: int) -> None:
        """Say it, once JOIN has told."""
        self._decoder.connection = number

    @property
    def receiving_payload(self) -> bool:
        """The next bytes belong to a payload whose length is known: all of them will come."""
        return self._decoder.receiving_payload

    def get_buffer(self) -> memoryview:
        """Return memory to receive into; valid until the next call of any method.

        Raises:
            LocalProtocolError: What already arrived was not taken first.
        """
        return self._decoder.get_buffer()

    def buffer_updated(self, received_bytes: int) -> None:
        """Say how many bytes were received into the buffer from ``get_buffer``."""
        self._decoder.buffer_updated(received_bytes)
        self.received_bytes += received_bytes

    def eof(self) -> None:
        """Say that the peer closed its direction of the connection."""
        self._decoder.feed_eof()

    def next_arrival(self) -> Arrival | NeedData:
        """Take the next frame, or what ended the connection; ``NEED_DATA`` if there is none."""
        if self.ended:
            return NEED_DATA
        try:
            found = self._decoder.next_frame()
        except FrameError as error:
            self.ended = True
            return error
        self.ended = isinstance(found, EndOfFrames)
        return found
