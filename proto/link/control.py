"""The control messages of one end of a link over all epochs: counted, kept, heard once.

Theory of operation. In each direction control messages go over the first connection of an epoch,
in order, so the n-th one that is said is the n-th one that is heard and needs no number on the
wire. Whoever says one keeps it until the other end has confirmed the count, with a keep-alive.
After a cut both ends say how many they have heard, and the rest is said again: each is heard
exactly once. Messages that only say how things stand (ACK, KEEPALIVE) and those that open a
connection or end one that is nobody's are not counted.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final

from proto.errors import LocalProtocolError, MessageError
from proto.limits import CONFIRM_CONTROL_BYTES, MAX_CONTROL_BYTES
from proto.link.dispatch import FRAMES
from proto.link.frames import Buffer, FrameType

UNCOUNTED: Final = frozenset(
    {
        FrameType.JOIN,
        FrameType.RESUME,
        FrameType.RECOVER,
        FrameType.REFUSED,
        FrameType.ACK,
        FrameType.JOINED,
        FrameType.RESUMED,
        FrameType.RECOVERED,
        FrameType.KEEPALIVE,
    }
)
"""Control messages that are not said again."""


def is_counted(frame_type: FrameType) -> bool:
    """Whether a message of this type is a control message that a cut must not lose."""
    return not FRAMES[frame_type].numbered and frame_type not in UNCOUNTED


class ControlLog:
    """What one end has said and heard.

    Attributes:
        said: Counted messages that were said.
        heard: Counted messages of the other end's that were taken.
        kept_bytes: Wire bytes of those that are not confirmed.
    """

    def __init__(self) -> None:
        """Start before the first message."""
        self.said = 0
        self.heard = 0
        self.kept_bytes = 0
        self._kept: deque[tuple[Buffer, ...]] = deque()
        self._untold_bytes = 0

    def may_say(self, frame_type: FrameType) -> bool:
        """Whether there is room for another; a message without payload always has some."""
        if not FRAMES[frame_type].max_payload_bytes:
            return True
        return self.kept_bytes < MAX_CONTROL_BYTES

    def say(self, frame_type: FrameType, buffers: Sequence[Buffer]) -> None:
        """Count and keep a message that is about to be written.

        Raises:
            LocalProtocolError: Too much is not confirmed. Nothing is changed.
        """
        if not self.may_say(frame_type):
            raise LocalProtocolError(f"{self.kept_bytes} bytes of messages are not confirmed")
        self.said += 1
        self._kept.append(tuple(buffers))
        self.kept_bytes += sum(map(len, buffers))

    def hear(self, wire_bytes: int) -> None:
        """Count a message of the other end's."""
        self.heard += 1
        self._untold_bytes += wire_bytes

    @property
    def should_tell(self) -> bool:
        """So much was heard that the other end should know soon."""
        return self._untold_bytes >= CONFIRM_CONTROL_BYTES

    def told(self) -> None:
        """The other end is about to be told ``heard``."""
        self._untold_bytes = 0

    def confirm(self, where: str, heard: int) -> None:
        """Forget what the other end has heard; an older count than was known means nothing.

        Raises:
            MessageError: It claims to have heard more than was said. Nothing is changed.
        """
        if heard > self.said:
            raise MessageError(where, f"at most {self.said} messages heard", str(heard))
        while len(self._kept) > self.said - heard:
            self.kept_bytes -= sum(map(len, self._kept.popleft()))

    def unconfirmed(self) -> tuple[tuple[Buffer, ...], ...]:
        """Return the messages that the other end may not have heard, in order."""
        return tuple(self._kept)
