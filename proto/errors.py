"""Errors of the sans-IO codecs.

Two reactions exist: *we* called a codec wrongly (a bug, ``LocalProtocolError``), or the other end
sent something that its format does not allow (``RemoteProtocolError``). Feeding bytes from a peer
never raises anything else.
"""


class ProtocolError(Exception):
    """Base of everything ``proto`` raises; never raised itself."""


class LocalProtocolError(ProtocolError):
    """Our own code used a codec in a way its state does not allow."""


class RemoteProtocolError(ProtocolError):
    """The other end sent bytes that its format does not allow.

    Attributes:
        where: Position in words, e.g. ``"frame 17, byte 24"`` or
            ``"section 2 (ram), offset 0x1f00"``.
        expected: What the format allows there.
        got: What was found.
    """

    def __init__(self, where: str, expected: str, got: str) -> None:
        super().__init__(f"{where}: expected {expected}, got {got}")
        self.where = where
        self.expected = expected
        self.got = got


class AdmissionError(RemoteProtocolError):
    """What came before the first frame is no admission."""


class FrameError(RemoteProtocolError):
    """A link frame is malformed: magic, type, length or sequence number."""


class VersionMismatchError(RemoteProtocolError):
    """The peer speaks no protocol version that we speak."""


class UnexpectedMessageError(RemoteProtocolError):
    """A well-formed message arrived in a state in which it is not legal."""


class MessageError(RemoteProtocolError):
    """A link message's fields are missing, of the wrong type, or out of range."""


class CodecError(RemoteProtocolError):
    """Compressed data does not decompress to exactly the announced length."""


class QemuStreamError(RemoteProtocolError):
    """A QEMU migration stream is not what its version documents."""


class QmpProtocolError(RemoteProtocolError):
    """What answered on a QMP socket does not speak QMP."""
