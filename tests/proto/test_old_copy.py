"""The old copy on the link: announced in order, once, and never more than was agreed."""

import dataclasses

import pytest

from proto.errors import LocalProtocolError, MessageError
from proto.link import messages as m
from proto.link.dispatch import OLD_COPY, encode_message
from proto.link.frames import FrameType, encode_frame
from proto.link.session import LinkSession
from proto.link.state import Role
from tests.link_pair import DIGEST, HELLO, STATE, Pair, feed, welcome


def greeted_with_old_copy(old_pages: int) -> Pair:
    pair = Pair()
    pair.say(Role.SOURCE, dataclasses.replace(HELLO, vm_id="vm-1"))
    pair.say(Role.DESTINATION, dataclasses.replace(welcome(), old_pages=old_pages))
    return pair


def test_an_old_copy_is_announced_in_pieces_while_pages_flow() -> None:
    pair = greeted_with_old_copy(5)
    pair.say(Role.DESTINATION, m.OldCopy(0, bytes(32)))
    pair.say(Role.SOURCE, *STATE[:3])
    pair.say(Role.DESTINATION, m.OldCopy(2, bytes(16)), m.OldCopy(3, b"", is_last=True))
    pair.say(Role.SOURCE, *STATE[3:])
    pair.say(Role.DESTINATION, m.Verified(DIGEST, 1000))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (m.OldCopy(1, bytes(16)), "old pages from 2"),
        (m.OldCopy(3, bytes(16)), "old pages from 2"),
        (m.OldCopy(2, bytes(64)), "5 old pages"),
    ],
)
def test_an_announcement_out_of_order_or_beyond_what_was_agreed_is_refused(
    message: m.OldCopy, expected: str
) -> None:
    pair = greeted_with_old_copy(5)
    pair.say(Role.DESTINATION, m.OldCopy(0, bytes(32)))
    with pytest.raises(LocalProtocolError, match=expected):
        pair.dst.send(message)
    with pytest.raises(MessageError, match=expected):
        feed(pair.src, b"".join(encode_frame(FrameType.OLD_COPY, 0, *encode_message(message))))


def test_nothing_is_announced_behind_the_last() -> None:
    pair = greeted_with_old_copy(5)
    pair.say(Role.DESTINATION, m.OldCopy(0, bytes(32), is_last=True))
    with pytest.raises(LocalProtocolError, match="behind the last"):
        pair.dst.send(m.OldCopy(2, bytes(16)))


def test_an_old_copy_of_a_vm_without_identity_is_refused() -> None:
    pair = Pair()
    pair.say(Role.SOURCE, HELLO)
    offered = dataclasses.replace(welcome(), old_pages=1)
    with pytest.raises(LocalProtocolError, match="without identity"):
        pair.dst.send(offered)
    with pytest.raises(MessageError, match="without identity"):
        feed(pair.src, b"".join(encode_frame(FrameType.WELCOME, 0, *encode_message(offered))))


def test_an_announcement_of_half_a_digest_or_of_nothing_is_refused() -> None:
    for payload, expected in ((bytes(17), "digests of 16 bytes"), (b"", "at least one digest")):
        pair = greeted_with_old_copy(5)
        header = OLD_COPY.pack(0, 0, 0, 0)
        with pytest.raises(MessageError, match=expected):
            feed(pair.src, b"".join(encode_frame(FrameType.OLD_COPY, 0, header, (payload,))))


def test_an_identity_that_could_be_a_path_is_refused() -> None:
    for vm_id in ("../x", ".", "", "a/b", "a" * 65, "é"):
        with pytest.raises(LocalProtocolError, match="letters, digits"):
            LinkSession(Role.SOURCE).send(dataclasses.replace(HELLO, vm_id=vm_id))
