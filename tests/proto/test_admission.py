"""The admission: what anybody may send us before we know who he is."""

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import AdmissionError
from proto.limits import NONCE_BYTES, PROOF_BYTES
from proto.link.admission import (
    ADMISSION_MAGIC,
    ANSWER_BYTES,
    OPENING_BYTES,
    VERSION,
    Answer,
    Opening,
    Verdict,
    is_proof,
    prove,
)
from proto.link.frames import MAGIC
from proto.link.state import Role

nonces = st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES)
tokens = st.binary(min_size=32, max_size=64)
roles = st.sampled_from(Role)


@given(nonces, st.booleans())
def test_an_opening_survives_the_round_trip(nonce: bytes, has_token: bool) -> None:
    opening = Opening(nonce, has_token)
    data = opening.encode()
    assert len(data) == OPENING_BYTES
    assert Opening.decode(data) == opening


@given(st.sampled_from(Verdict), nonces)
def test_an_answer_survives_the_round_trip(verdict: Verdict, value: bytes) -> None:
    answer = Answer(verdict, value)
    data = answer.encode()
    assert len(data) == ANSWER_BYTES
    assert Answer.decode(data) == answer


@given(st.binary(max_size=64) | st.binary(max_size=60).map(ADMISSION_MAGIC.__add__))
def test_any_bytes_are_an_admission_or_an_admission_error(data: bytes) -> None:
    for decode, length in ((Opening.decode, OPENING_BYTES), (Answer.decode, ANSWER_BYTES)):
        try:
            decode(data)
        except AdmissionError:
            continue
        assert len(data) == length
        assert data.startswith(ADMISSION_MAGIC)


@given(st.integers(0, OPENING_BYTES - NONCE_BYTES - 1), st.integers(1, 255))
def test_every_bit_of_a_head_counts(offset: int, change: int) -> None:
    data = bytearray(Opening(bytes(NONCE_BYTES), has_token=False).encode())
    data[offset] ^= change
    try:
        opening = Opening.decode(bytes(data))
    except AdmissionError:
        return
    assert (opening.version != VERSION) or opening.has_token


def test_an_opening_of_another_version_is_known_as_one() -> None:
    later = Opening(bytes(NONCE_BYTES), has_token=True, version=2)
    data = bytearray(later.encode())
    data[7] = 0x80  # what a later version may put there
    assert Opening.decode(bytes(data)).version == 2


@given(tokens, roles, nonces, nonces)
def test_a_proof_is_what_the_document_says(
    token: bytes, role: Role, source: bytes, destination: bytes
) -> None:
    text = f"precopy admission 1 {role.name.lower()}".encode()
    proof = hmac.digest(token, text + source + destination, hashlib.sha256)
    assert len(proof) == PROOF_BYTES
    assert prove(token, role, source, destination) == proof
    assert is_proof(proof, token, role, source, destination)


@given(tokens, tokens, nonces, nonces)
def test_no_other_proof_is_taken(token: bytes, other: bytes, one: bytes, two: bytes) -> None:
    proof = prove(token, Role.SOURCE, one, two)
    assert not is_proof(proof, token, Role.DESTINATION, one, two)
    # HMAC fills keys up with zeroes
    same = token.ljust(64, b"\0") == other.ljust(64, b"\0")
    assert is_proof(proof, other, Role.SOURCE, one, two) == same
    assert is_proof(proof, token, Role.SOURCE, two, one) == (one == two)
    assert not is_proof(proof[:-1], token, Role.SOURCE, one, two)


@pytest.mark.parametrize("start", [MAGIC, b"\x16\x03\x01\x02", b"GET ", b"SSH-"])
def test_other_languages_are_told_apart_by_their_first_bytes(start: bytes) -> None:
    assert start != ADMISSION_MAGIC
    with pytest.raises(AdmissionError, match="byte 0: expected d7 50 43 41, got "):
        Opening.decode(start)
