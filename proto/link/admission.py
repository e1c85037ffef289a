"""Admission: what both ends say on a connection before its first frame, where they ask for it.

    source                                 destination
    OPENING  nonce, whether it has a token ─▶
             ◀─ ANSWER  ADMITTED, or a refusal, or PROVE and a nonce
    PROOF    of the token ─▶                               (after PROVE only)
             ◀─ ANSWER  ADMITTED and the destination's proof, or WRONG_TOKEN

Everything has a fixed size: of an end that was not admitted nothing is parsed that has a length.
Both proofs are keyed hashes over both nonces and the prover's role, so neither can be used again,
nor be played back to the one who made it. The source proves first: who merely connects learns
nothing that he could try tokens on at home.
"""

import enum
import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import Final

from proto.errors import AdmissionError
from proto.limits import NONCE_BYTES, PROOF_BYTES
from proto.link.state import Role

ADMISSION_MAGIC: Final = b"\xd7PCA"
"""Begins like a frame's, so that either end can tell what the other wants."""

VERSION: Final = 1

_HEAD: Final = struct.Struct("<4sBB2s")

OPENING_BYTES: Final = _HEAD.size + NONCE_BYTES
ANSWER_BYTES: Final = _HEAD.size + PROOF_BYTES

_PROVERS: Final = {
    Role.SOURCE: b"precopy admission 1 source",
    Role.DESTINATION: b"precopy admission 1 destination",
}


class Verdict(enum.IntEnum):
    """What the destination says to an opening or a proof; 0 is invalid."""

    ADMITTED = 1
    """Frames may follow."""
    PROVE = 2
    """The source has to prove that it has the token."""
    VERSION_UNKNOWN = 3
    """The opening is of another version."""
    NO_TLS = 4
    """The destination takes only connections with TLS."""
    NOT_AUTHORIZED = 5
    """The certificate is good, but not on the destination's list."""
    TOKEN_MISSING = 6
    """The destination wants a token and the source has none."""
    TOKEN_UNKNOWN = 7
    """The source has a token and the destination none."""
    TOKEN_WRONG = 8
    """The two ends have different tokens."""


@dataclass(frozen=True, slots=True)
class Opening:
    """OPENING: the first bytes of a connection.

    Attributes:
        nonce: 32 random bytes.
        has_token: The source can prove a token, and wants the destination to.
        version: Of the admission, not of the frames that follow.
    """

    nonce: bytes
    has_token: bool
    version: int = VERSION

    def encode(self) -> bytes:
        """As it goes over the wire."""
        flags = bytes((self.has_token, 0))
        return _HEAD.pack(ADMISSION_MAGIC, self.version, 0, flags) + self.nonce

    @classmethod
    def decode(cls, data: bytes) -> "Opening":
        """Read ``OPENING_BYTES``.

        Raises:
            AdmissionError: They are none of any version.
        """
        _check(data, OPENING_BYTES)
        _, version, zero, flags = _HEAD.unpack_from(data)
        if version == VERSION and (zero or flags not in {b"\0\0", b"\1\0"}):
            raise AdmissionError("opening, byte 5", "00, 00 or 01, 00", data[5:8].hex(" "))
        return cls(data[_HEAD.size :], flags[:1] == b"\1", version)


@dataclass(frozen=True, slots=True)
class Answer:
    """ANSWER: the destination's part.

    Attributes:
        verdict: What it says.
        value: PROVE: its nonce. ADMITTED after a proof: its own. Else zeroes.
        version: The newest admission that it knows.
    """

    verdict: Verdict
    value: bytes = bytes(PROOF_BYTES)
    version: int = VERSION

    def encode(self) -> bytes:
        """As it goes over the wire."""
        return _HEAD.pack(ADMISSION_MAGIC, self.version, self.verdict, b"\0\0") + self.value

    @classmethod
    def decode(cls, data: bytes) -> "Answer":
        """Read ``ANSWER_BYTES``.

        Raises:
            AdmissionError: They are none.
        """
        _check(data, ANSWER_BYTES)
        _, version, verdict, zero = _HEAD.unpack_from(data)
        try:
            known = Verdict(verdict)
        except ValueError as error:
            raise AdmissionError("answer, byte 5", "a verdict", str(verdict)) from error
        if zero != b"\0\0":
            raise AdmissionError("answer, byte 6", "00 00", zero.hex(" "))
        return cls(known, data[_HEAD.size :], version)


def _check(data: bytes, length: int) -> None:
    if (magic := data[: len(ADMISSION_MAGIC)]) != ADMISSION_MAGIC:
        raise AdmissionError("byte 0", ADMISSION_MAGIC.hex(" "), magic.hex(" "))
    if len(data) != length:
        raise AdmissionError("its end", f"{length} bytes", str(len(data)))


def prove(token: bytes, prover: Role, source_nonce: bytes, destination_nonce: bytes) -> bytes:
    """One end's proof that it knows the token: HMAC-SHA256 over its role and both nonces."""
    message = _PROVERS[prover] + source_nonce + destination_nonce
    return hmac.new(token, message, hashlib.sha256).digest()


def is_proof(
    proof: bytes, token: bytes, prover: Role, source_nonce: bytes, destination_nonce: bytes
) -> bool:
    """Whether a proof is the other end's; takes the same time for any wrong one."""
    return hmac.compare_digest(proof, prove(token, prover, source_nonce, destination_nonce))
