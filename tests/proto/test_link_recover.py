"""What is said after a crash: a question instead of HELLO, one answer, BYE."""

import dataclasses

import msgpack  # noqa: TID251 - makes headers that our own packer would refuse
import pytest

from proto.errors import (
    LocalProtocolError,
    MessageError,
    UnexpectedMessageError,
    VersionMismatchError,
)
from proto.link import messages as m
from proto.link.dispatch import Context, decode_message, encode_message
from proto.link.frames import Frame, FrameType
from proto.link.state import LinkState, Role
from proto.link.vocabulary import PROTOCOL_VERSION
from tests.link_pair import EXAMPLES, HELLO, End, Pair, feed

RECOVER = m.Recover(bytes(16), b"", "COMMIT_SENT")
BACK = m.Recovered("ABORTED", "source", None, "dead")
THERE = m.Recovered("COMMITTED", "destination", "running")


@pytest.mark.parametrize("answer", [BACK, THERE])
def test_a_question_its_answer_and_the_end(answer: m.Recovered) -> None:
    pair = Pair()
    pair.say(Role.SOURCE, RECOVER)
    pair.say(Role.DESTINATION, m.KeepAlive())
    pair.say(Role.SOURCE, m.KeepAlive())
    pair.say(Role.DESTINATION, answer)
    pair.say(Role.SOURCE, m.KeepAlive(), m.Bye())
    pair.say(Role.DESTINATION, m.Bye())
    assert pair.both_closed()


def test_a_destination_that_knows_nothing_refuses() -> None:
    pair = Pair()
    pair.say(Role.SOURCE, RECOVER)
    pair.say(Role.DESTINATION, m.Refused("unknown-migration", "no record"))
    assert pair.src.state is pair.dst.state is LinkState.REFUSED


@pytest.mark.parametrize("frame_type", FrameType)
def test_nothing_of_a_migration_is_legal_while_one_recovers(frame_type: FrameType) -> None:
    legal = {FrameType.KEEPALIVE, FrameType.RECOVERED, FrameType.REFUSED}
    pair = Pair()
    pair.say(Role.SOURCE, RECOVER)
    for end in (pair.src, pair.dst):
        for state in (LinkState.RECOVERING, LinkState.RECOVERED):
            end.state = state
            if frame_type not in legal | {FrameType.BYE}:
                assert not end.may_send(frame_type)
                with pytest.raises(LocalProtocolError):
                    end.send(EXAMPLES[frame_type])


def test_a_question_comes_first_or_never() -> None:
    pair = Pair().greet()
    assert not pair.src.may_send(FrameType.RECOVER)
    stranger = End(Role.SOURCE)
    with pytest.raises(UnexpectedMessageError):
        feed(pair.dst, b"".join(stranger.send(RECOVER)))
    assert End(Role.SOURCE).may_send(FrameType.HELLO)


@pytest.mark.parametrize("message", [RECOVER, HELLO])
def test_first_messages_of_other_versions(message: m.Message) -> None:
    fields = msgpack.unpackb(encode_message(message)[0])

    def decode(**changes: object) -> m.Message:
        header = msgpack.packb({**fields, **changes})
        return decode_message(Frame(message.frame_type, 0, header, b""), Context())

    newer = decode(version=PROTOCOL_VERSION + 1, more="than we know")
    assert isinstance(newer, m.Recover | m.Hello)
    assert newer.version == PROTOCOL_VERSION + 1
    with pytest.raises(VersionMismatchError):
        decode(version=PROTOCOL_VERSION + 2, oldest=PROTOCOL_VERSION + 1)
    for wrong in ({"version": 0}, {"oldest": 9}, {"version": "1"}):
        with pytest.raises(MessageError):
            decode(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        dataclasses.replace(BACK, state="PREPARED"),
        dataclasses.replace(BACK, guest_on="neither"),
        dataclasses.replace(THERE, run_state=""),
        dataclasses.replace(RECOVER, state="COMMITTED"),
        dataclasses.replace(RECOVER, migration_id=bytes(15)),
    ],
)
def test_what_no_record_can_say_is_not_sent(wrong: m.Message) -> None:
    with pytest.raises(LocalProtocolError, match="cannot be sent"):
        encode_message(wrong)
