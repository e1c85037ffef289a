import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import (
    FrameError,
    LocalProtocolError,
    MessageError,
    RemoteProtocolError,
    UnexpectedMessageError,
    VersionMismatchError,
)
from proto.guest_events import NEED_DATA
from proto.link import messages as m
from proto.link.account import BYTE_CLASSES
from proto.link.checks import choose_capabilities
from proto.link.dispatch import FRAMES, encode_message
from proto.link.exchange import LinkClosed
from proto.link.frames import FrameType, encode_frame
from proto.link.messages import Message
from proto.link.pages import PageBatch
from proto.link.state import VOID, Direction, LinkState, Role, next_state
from tests.link_pair import (
    DIGEST,
    HELLO,
    PAGES,
    STATE,
    TABLE,
    UNGREETED,
    End,
    Pair,
    end_in,
    feed,
    step,
    walks,
    welcome,
)
from tests.strategies import (
    CACHE_SLOTS,
    cuts,
    messages,
    same_message,
)


@pytest.mark.parametrize("kind", m.CommitKind)
@pytest.mark.parametrize("role", Role)
def test_every_message_in_every_state_is_a_move_or_the_right_error(
    role: Role, kind: m.CommitKind
) -> None:
    ways = walks(role, kind)
    unreachable = {LinkState.ERROR}
    if kind is m.CommitKind.RELAYED:
        unreachable |= {LinkState.COMMITTING, LinkState.RUNNING}
    if kind is not m.CommitKind.HELD:
        unreachable.add(LinkState.READY)
    assert set(LinkState) - set(ways) == unreachable
    void = VOID if role is Role.DESTINATION else frozenset[LinkState]()
    for state, frame_type in itertools.product(ways, FrameType):
        known = None if state in UNGREETED else kind
        for direction in Direction:
            end = end_in(role, kind, ways[state])
            assert end.state is state
            expected = next_state(role, known, state, frame_type, direction)
            if expected is not None:
                assert direction is Direction.RECEIVED or end.may_send(frame_type)
                step(end, frame_type, direction, kind)
                assert end.state is expected
            elif direction is Direction.SENT:
                assert not end.may_send(frame_type)
                with pytest.raises(LocalProtocolError):
                    step(end, frame_type, direction, kind)
                assert end.state is state
            elif state in void and FRAMES[frame_type].numbered:
                step(end, frame_type, direction, kind)
                assert (end.state, end.next_event()) == (state, NEED_DATA)
            else:
                with pytest.raises((UnexpectedMessageError, FrameError)):
                    step(end, frame_type, direction, kind)
                assert end.state is LinkState.ERROR


def test_a_held_migration_from_hello_to_bye() -> None:
    pair = Pair().verified()
    pair.say(Role.DESTINATION, m.Ack(9, 8), m.Ready())
    pair.say(Role.SOURCE, m.SourceDone(), m.Commit(), m.Commit())
    pair.say(Role.DESTINATION, m.Running("running", 3, 4), m.Bye())
    pair.say(Role.SOURCE, m.Bye())
    assert pair.both_closed()


def test_a_withheld_migration_commits_without_ready() -> None:
    pair = Pair(m.CommitKind.WITHHELD).verified()
    with pytest.raises(LocalProtocolError, match="READY in state verified"):
        pair.dst.send(m.Ready())
    pair.say(Role.SOURCE, m.SourceDone(), m.Commit())
    pair.say(Role.DESTINATION, m.Running("running"))
    pair.say(Role.SOURCE, m.Bye())
    pair.say(Role.DESTINATION, m.Bye())
    assert pair.both_closed()


def test_a_relayed_migration_is_committed_by_somebody_else() -> None:
    pair = Pair(m.CommitKind.RELAYED).greet()
    pair.say(Role.DESTINATION, m.ReturnPath(b"pong"))
    pair.say(Role.SOURCE, *STATE)
    pair.say(Role.DESTINATION, m.Verified(DIGEST, 1000), m.ReturnPath(b"shut"))
    with pytest.raises(LocalProtocolError, match="COMMIT in state verified"):
        pair.src.send(m.Commit())
    pair.say(Role.SOURCE, m.SourceDone(), m.Bye())
    pair.say(Role.DESTINATION, m.Bye())
    assert pair.both_closed()


def test_a_mismatch_is_bisected_and_given_up() -> None:
    pair = Pair().complete()
    pair.say(Role.DESTINATION, m.Mismatch(DIGEST, DIGEST, 999))
    query = m.DigestQuery(tuple(m.DigestRange(0, i, 1, DIGEST) for i in range(3)))
    pair.say(Role.SOURCE, query)
    with pytest.raises(LocalProtocolError, match="an index below 3"):
        pair.dst.send(m.DigestReply((0, 3)))
    pair.say(Role.DESTINATION, m.DigestReply((0, 2)))
    pair.say(Role.SOURCE, query)
    pair.say(Role.DESTINATION, m.DigestReply(()))
    pair.say(Role.SOURCE, m.Abort("integrity", "page 2 of pc.ram differs", "source"))
    pair.say(Role.DESTINATION, m.Bye())
    pair.say(Role.SOURCE, m.Bye())
    assert pair.both_closed()


def test_aborts_that_cross_are_understood() -> None:
    pair = Pair().greet()
    abort = m.Abort("cancelled", "", "source")
    forward = b"".join(pair.src.send(abort))
    back = b"".join(pair.dst.send(m.Ack(0, 0)) + pair.dst.send(abort))
    assert feed(pair.src, back) == [m.Ack(0, 0), abort]
    assert feed(pair.dst, forward) == [abort]
    assert pair.src.state is pair.dst.state is LinkState.ABORTED


def test_a_commit_that_crosses_the_destinations_abort_is_heard_and_void() -> None:
    pair = Pair().verified()
    pair.say(Role.DESTINATION, m.Ready())
    abort = m.Abort("guest", "the load failed after all", "source")
    forward, back = b"".join(pair.src.send(m.Commit())), b"".join(pair.dst.send(abort))
    assert feed(pair.dst, forward) == [m.Commit()]
    assert pair.dst.state is LinkState.ABORT_SENT
    assert not pair.dst.may_send(FrameType.RUNNING)
    assert feed(pair.src, back) == [abort]
    assert pair.src.state is LinkState.ABORTED


@given(st.lists(st.integers(0, 100_000), max_size=30))
def test_the_same_bytes_make_the_same_events_however_they_are_cut(
    positions: list[int],
) -> None:
    pair = Pair().complete()
    dst = End(Role.DESTINATION)
    data = pair.said[Role.SOURCE]
    hello_end = len(b"".join(End(Role.SOURCE).send(HELLO)))
    heard = feed(dst, data[:hello_end])
    dst.send(welcome())
    for piece in cuts(data[hello_end:], positions):
        heard += feed(dst, piece)
    assert len(heard) == 1 + len(STATE)
    for got, sent in zip(heard, [HELLO, *STATE], strict=True):
        assert not isinstance(got, LinkClosed)
        assert same_message(got, sent)
    assert dst.received_bytes == len(data)


def test_the_account_of_sent_bytes_closes_and_knows_the_classes() -> None:
    pair = Pair().complete()
    assert tuple(pair.src.sent_bytes) == BYTE_CLASSES
    assert sum(pair.src.sent_bytes.values()) == len(pair.said[Role.SOURCE])
    assert sum(pair.dst.sent_bytes.values()) == len(pair.said[Role.DESTINATION])
    classes = {name: count for name, count in pair.src.sent_bytes.items() if name != "control"}
    assert classes == {
        "zero": 2 * 16,
        "same": 0,
        "ref": 2 * 8,
        "delta": 2 * (8 + 4096),
        "literal": 2 * (2 * 8 + 8192),
        "opaque": len(b"QEVM" + b"start section" + b"x" + b"prelude"),
        "device_state": len(b"device"),
        "resent": 0,
    }


@given(st.lists(st.sampled_from(STATE[2:5]), max_size=8))
def test_the_window_counts_what_is_outstanding(sent: list[Message]) -> None:
    pair = Pair().greet()
    pair.say(Role.SOURCE, *STATE[:2])
    before = pair.src.window.outstanding_wire_bytes
    pair.say(Role.SOURCE, *sent)
    wire = pair.src.window.outstanding_wire_bytes - before
    assert wire == sum(sum(map(len, encode_message(x)[1])) for x in sent) + sum(
        24 + len(encode_message(x)[0]) for x in sent
    )
    raw = {FrameType.PAGES: 4 * 4096, FrameType.ROUND_END: 0, FrameType.OPAQUE: 500}
    assert pair.src.window.outstanding_raw_bytes == 4 + sum(raw[x.frame_type] for x in sent)
    last = pair.dst.sequence.received_seq
    assert last == pair.src.window.sent_seq
    pair.say(Role.DESTINATION, m.Ack(last, 0))
    assert pair.src.window.retained_bytes == 0
    assert pair.src.window.outstanding_wire_bytes == before + wire
    pair.say(Role.DESTINATION, m.Ack(last, last))
    assert pair.src.window.outstanding_wire_bytes == 0
    assert pair.src.window.outstanding_raw_bytes == 0


@pytest.mark.parametrize("ack", [m.Ack(10, 0), m.Ack(5, 6), m.Ack(4, 3), m.Ack(5, 2)])
def test_an_acknowledgement_that_cannot_be_true_is_refused_on_both_ends(ack: m.Ack) -> None:
    pair = Pair().complete()
    pair.say(Role.DESTINATION, m.Ack(5, 3))
    with pytest.raises(LocalProtocolError, match="cannot acknowledge"):
        pair.dst.send(ack)
    assert pair.dst.may_send(FrameType.VERIFIED)
    forged = b"".join(encode_frame(FrameType.ACK, 0, *encode_message(ack)))
    with pytest.raises(MessageError):
        feed(pair.src, forged)
    assert pair.src.state is LinkState.ERROR


@pytest.mark.parametrize("seq", [1, 2, 4, 1 << 60])
def test_a_gap_or_a_repeat_in_the_numbers_is_refused(seq: int) -> None:
    pair = Pair().greet()
    pair.say(Role.SOURCE, *STATE[:2])
    forged = encode_frame(FrameType.ROUND_END, seq, *encode_message(m.RoundEnd(0)))
    with pytest.raises(FrameError, match="sequence number 3"):
        feed(pair.dst, b"".join(forged))


@given(st.binary(max_size=200))
def test_garbage_gives_only_remote_protocol_errors(data: bytes) -> None:
    for role, prefix in itertools.product(Role, (b"", b"\xd7PCL", b"\xd7PCL\x20\x00")):
        end = End(role)
        try:
            feed(end, prefix + data)
        except RemoteProtocolError:
            assert end.state is LinkState.ERROR


@given(st.data(), st.sampled_from(Role), st.sampled_from(m.CommitKind))
def test_mutated_conversations_give_only_remote_protocol_errors(
    data: st.DataObject, role: Role, kind: m.CommitKind
) -> None:
    ways = walks(role, kind)
    end = end_in(role, kind, ways[data.draw(st.sampled_from(sorted(ways, key=str)))])
    seq = end.sequence.received_seq
    wire = b""
    for message in data.draw(st.lists(messages(), min_size=1, max_size=3)):
        numbered = FRAMES[message.frame_type].numbered
        seq += numbered
        wire += b"".join(
            encode_frame(message.frame_type, seq * numbered, *encode_message(message))
        )
    mutated = bytearray(wire)
    for _ in range(data.draw(st.integers(0, 2))):
        mutated[data.draw(st.integers(0, len(wire) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        feed(end, bytes(mutated))
        end.eof()
        assert isinstance(end.next_event(), LinkClosed)
    except RemoteProtocolError:
        assert end.state is LinkState.ERROR


def test_an_error_stays_and_leaves_last_words_where_they_were_legal() -> None:
    pair = Pair().greet()
    with pytest.raises(FrameError) as first:
        feed(pair.dst, b"GET / HTTP/1.1")
    with pytest.raises(FrameError) as second:
        pair.dst.next_event()
    assert second.value is first.value
    assert pair.dst.state is LinkState.ERROR
    assert not pair.dst.may_send(FrameType.ACK)
    abort = m.Abort("peer-protocol", "what?", "source")
    assert feed(pair.src, b"".join(pair.dst.send(abort))) == [abort]
    with pytest.raises(LocalProtocolError):
        pair.dst.send(abort)


def test_a_hello_that_cannot_be_accepted_can_be_refused() -> None:
    src, dst = End(Role.SOURCE), End(Role.DESTINATION)
    hello = dataclasses.replace(HELLO, version=9, oldest=8)
    with pytest.raises(VersionMismatchError):
        feed(dst, b"".join(src.send(hello)))
    assert not dst.may_send(FrameType.WELCOME)
    refused = m.Refused("version", "this end speaks version 1")
    assert feed(src, b"".join(dst.send(refused))) == [refused]
    assert src.state is LinkState.REFUSED


def test_a_stranger_gets_no_last_words() -> None:
    dst = End(Role.DESTINATION)
    with pytest.raises(FrameError):
        feed(dst, b"GET / HTTP/1.1")
    assert not any(dst.may_send(frame_type) for frame_type in FrameType)


@pytest.mark.parametrize("garbage", [b"garbage", b""])
def test_after_commit_the_source_never_says_abort(garbage: bytes) -> None:
    pair = Pair(m.CommitKind.WITHHELD).verified()
    pair.say(Role.SOURCE, m.Commit())
    if garbage:
        with pytest.raises(FrameError):
            feed(pair.src, garbage)
    assert not pair.src.may_send(FrameType.ABORT)


def test_a_required_capability_must_be_known_an_optional_one_need_not() -> None:
    known = frozenset({"a", "c"})
    hello = dataclasses.replace(HELLO, required=("c",), optional=("a", "b"))
    src = End(Role.SOURCE)
    wire = b"".join(src.send(hello))
    with pytest.raises(MessageError, match="required"):
        feed(End(Role.DESTINATION), wire)
    dst = End(Role.DESTINATION, capabilities=known)
    assert feed(dst, wire) == [hello]
    assert choose_capabilities(hello, known) == ("a", "c")
    answer = dataclasses.replace(welcome(), capabilities=choose_capabilities(hello, known))
    assert feed(src, b"".join(dst.send(answer))) == [answer]


@pytest.mark.parametrize(
    "answer",
    [
        dataclasses.replace(welcome(), version=2),
        dataclasses.replace(welcome(), version=0),
        dataclasses.replace(welcome(), cache_slots=CACHE_SLOTS + 1),
        dataclasses.replace(welcome(), cache_slots=1, landed=("pc.ram",)),
        dataclasses.replace(welcome(), cache_slots=0, landed=("pc.ram", "pc.ram")),
        dataclasses.replace(welcome(), capabilities=("c",)),
        welcome(m.CommitKind.RELAYED),
    ],
)
def test_a_welcome_must_be_within_what_was_offered(answer: m.Welcome) -> None:
    pair = Pair()
    pair.say(Role.SOURCE, HELLO)
    with pytest.raises(LocalProtocolError):
        pair.dst.send(answer)
    assert pair.dst.state is LinkState.GREETING
    forged = encode_frame(FrameType.WELCOME, 0, *encode_message(answer))
    with pytest.raises((MessageError, VersionMismatchError)):
        feed(pair.src, b"".join(forged))


def test_pages_are_judged_by_the_agreed_shape_and_cache() -> None:
    for slots, block, legal in ((8, 0, False), (10, 0, True), (10, 1, False)):
        pair = Pair()
        pair.say(Role.SOURCE, HELLO)
        pair.say(Role.DESTINATION, welcome(slots=slots))
        pair.say(Role.SOURCE, TABLE)
        wire = b"".join(pair.src.send(dataclasses.replace(PAGES, block=block)))
        if legal:
            assert len(feed(pair.dst, wire)) == 1
        else:
            with pytest.raises(MessageError):
                feed(pair.dst, wire)


@pytest.mark.parametrize("cut", [0, 1, 23, 24, 40])
def test_a_cut_is_an_event_that_says_what_is_lost(cut: int) -> None:
    pair = Pair().greet()
    wire = b"".join(pair.src.send(TABLE))
    assert feed(pair.dst, wire[:cut]) == []
    pair.dst.eof()
    assert pair.dst.next_event() == LinkClosed(orderly=False, partial_bytes=cut)
    assert pair.dst.next_event() == LinkClosed(orderly=False, partial_bytes=cut)


def test_messages_before_the_end_are_heard_and_a_close_after_bye_is_orderly() -> None:
    pair = Pair(m.CommitKind.RELAYED).verified()
    wire = b"".join(pair.src.send(m.SourceDone()) + pair.src.send(m.Bye()))
    pair.dst.put(wire)
    pair.dst.eof()
    heard = [pair.dst.next_event() for _ in range(3)]
    assert heard == [m.SourceDone(), m.Bye(), LinkClosed(orderly=True)]


def test_a_message_that_does_not_fit_changes_nothing() -> None:
    pair = Pair().greet()
    pair.say(Role.SOURCE, TABLE)
    sent, account = pair.src.window.sent_seq, dict(pair.src.sent_bytes)
    for wrong in (PageBatch(0), m.Switchover(bytes(70_000)), PageBatch(1 << 16, same_count=1)):
        with pytest.raises(LocalProtocolError):
            pair.src.send(wrong)
    assert (pair.src.window.sent_seq, pair.src.sent_bytes) == (sent, account)
    assert pair.src.state is LinkState.PRECOPY
    pair.say(Role.SOURCE, PAGES)


def test_after_a_broken_write_nothing_more_is_sent() -> None:
    pair = Pair().greet()
    pair.src.send(TABLE)
    pair.src.send_failed()
    assert not any(pair.src.may_send(frame_type) for frame_type in FrameType)
    with pytest.raises(RemoteProtocolError):
        pair.src.next_event()


def test_page_buffers_pass_through_send_uncopied() -> None:
    pair = Pair().greet()
    pair.say(Role.SOURCE, TABLE)
    buffers = pair.src.send(PAGES)
    payload = (*PAGES.encoded_buffers, PAGES.delta_encoded)
    assert all(a is b for a, b in zip(buffers[1:], payload, strict=True))
    kept = pair.src.window.unreceived()[-1]
    assert kept.buffers == tuple(buffers)
