"""Connections that are nobody's yet: what they may begin with besides HELLO, and how to part."""

from typing import Final

from proto.errors import UnexpectedMessageError
from proto.link.dispatch import Context, decode_message, encode_message
from proto.link.frames import Buffer, Frame, FrameType, encode_frame
from proto.link.messages import Join, Refused, Resume

UNKNOWN: Final = Refused("unknown", "no migration of this name and token is under way here")
"""For whoever wants to join what is not his; it does not say what was wrong."""

LATER: Final = (FrameType.JOIN, FrameType.RESUME)
"""What a connection of a migration that is under way begins with."""


def decode_later(frame: Frame) -> Join | Resume:
    """Destination: decode what a connection that is nobody's yet may begin with instead of HELLO.

    Raises:
        RemoteProtocolError: It is neither JOIN nor RESUME, or none that could be meant for anybody.
    """
    if frame.frame_type not in LATER:
        expected = "HELLO, JOIN or RESUME"
        raise UnexpectedMessageError(frame.where, expected, frame.frame_type.name)
    message = decode_message(frame, Context())
    assert isinstance(message, Join | Resume), "that is what its type says"
    return message


def refusal(message: Refused) -> list[Buffer]:
    """Destination: the bytes that turn a connection away that belongs to no migration."""
    return encode_frame(message.frame_type, 0, *encode_message(message))
