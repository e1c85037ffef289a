"""Several connections: numbered messages in order, joins that nobody can forge, ends that count."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import (
    FrameError,
    LocalProtocolError,
    MessageError,
    RemoteProtocolError,
    UnexpectedMessageError,
)
from proto.guest_events import NEED_DATA
from proto.limits import MAX_STREAMS
from proto.link import messages as m
from proto.link.connection import LinkConnection
from proto.link.dispatch import encode_message
from proto.link.exchange import Event, LinkClosed
from proto.link.frames import FrameType, encode_frame
from proto.link.messages import Message
from proto.link.state import LinkState, Role
from tests.link_pair import (
    DIGEST,
    HELLO,
    PAGES,
    STATE,
    TABLE,
    End,
    Pair,
    arrival,
    feed,
    join,
    welcome,
)
from tests.strategies import cuts, messages, same_message

TOKEN = bytes(range(16))


def greeted(streams: int, kind: m.CommitKind = m.CommitKind.HELD) -> Pair:
    """Both ends, which have agreed upon so many connections."""
    pair = Pair(kind)
    wish = "relay" if kind is m.CommitKind.RELAYED else "auto"
    pair.say(Role.SOURCE, dataclasses.replace(HELLO, commit=wish, streams=streams))
    token = TOKEN if streams > 1 else b""
    answer = dataclasses.replace(welcome(kind), streams=streams, join_token=token)
    pair.say(Role.DESTINATION, answer)
    return pair


def joined(streams: int, kind: m.CommitKind = m.CommitKind.HELD) -> Pair:
    """Both ends, with all connections open."""
    pair = greeted(streams, kind)
    for number in range(1, streams):
        join(pair.src, pair.dst, number)
    return pair


def same(heard: Sequence[Event], said: Sequence[Message]) -> bool:
    return len(heard) == len(said) and all(
        not isinstance(a, LinkClosed) and same_message(a, b)
        for a, b in zip(heard, said, strict=True)
    )


def orders(queues: tuple[tuple[int, ...], ...]) -> Iterator[tuple[int, ...]]:
    """Every order in which queues can be taken from, as the numbers of the queues."""
    if not any(queues):
        yield ()
    for number, queue in enumerate(queues):
        if queue:
            rest = (*queues[:number], queue[1:], *queues[number + 1 :])
            yield from ((number, *order) for order in orders(rest))


@pytest.mark.parametrize(("streams", "count"), [(2, 5), (3, 4)])
def test_whichever_connection_brings_a_message_and_when_they_are_heard_in_order(
    streams: int, count: int
) -> None:
    said = STATE[:count]
    for places in itertools.product(range(streams), repeat=count):
        pair = joined(streams)
        frames = [b"".join(pair.src.send(x, at)) for x, at in zip(said, places, strict=True)]
        queues = tuple(
            tuple(i for i, at in enumerate(places) if at == number) for number in range(streams)
        )
        for number, order in enumerate(orders(queues)):
            dst = joined(streams).dst if number else pair.dst
            heard, left = [], [list(queue) for queue in queues]
            for at in order:
                heard += feed(dst, frames[left[at].pop(0)], at)
            assert same(heard, said)
            assert dst.sequence.received_seq == count
            assert dst.sequence.held_bytes == 0


@given(st.data(), st.integers(1, 4))
def test_however_bytes_of_several_connections_are_cut_the_same_messages_are_heard(
    data: st.DataObject, streams: int
) -> None:
    pair = joined(streams)
    said = [*STATE[:2], *STATE[2:5] * 3, *STATE[5:]]
    wires = [bytearray() for _ in range(streams)]
    before = sum(pair.src.sent_bytes.values())
    for message in said:
        at = data.draw(st.integers(0, streams - 1))
        wires[at] += b"".join(pair.src.send(message, at))
    positions = st.lists(st.integers(0, 100_000), max_size=8)
    pieces = [list(cuts(bytes(wire), data.draw(positions))) for wire in wires]
    heard: list[Event] = []
    received = pair.dst.received_bytes
    while filled := [number for number, left in enumerate(pieces) if left]:
        at = data.draw(st.sampled_from(filled))
        heard += feed(pair.dst, pieces[at].pop(0), at)
    assert same(heard, said)
    assert pair.dst.state is LinkState.STATE_COMPLETE
    assert pair.dst.received_bytes - received == sum(map(len, wires))
    assert sum(pair.src.sent_bytes.values()) - before == sum(map(len, wires))


@given(st.integers(0, 2), st.integers(0, 400), st.lists(st.integers(0, 2), min_size=9))
def test_a_cut_of_any_connection_is_told_once_and_what_came_is_heard(
    cut: int, at: int, places: list[int]
) -> None:
    pair = joined(3)
    wires = [bytearray() for _ in range(3)]
    whole = {0}
    for message, place in zip(STATE[:8], places, strict=False):
        wires[place] += b"".join(pair.src.send(message, place))
        whole |= {len(wires[cut])}
    heard: list[Event] = []
    for number, wire in enumerate(wires):
        heard += feed(pair.dst, bytes(wire[:at] if number == cut else wire), number)
    assert same(heard, STATE[: len(heard)])
    if min(at, len(wires[cut])) in whole:
        pair.dst.put(b"\xd7PC", cut)  # it ends within a frame
    pair.dst.eof(cut)
    end = pair.dst.next_event()
    assert isinstance(end, LinkClosed)
    assert (end.orderly, end.connection) == (False, cut)
    assert pair.dst.next_event() == (end if cut == 0 else NEED_DATA)
    if cut:  # last words still come over the first connection
        abort = m.Abort("cancelled", "", "source")
        assert feed(pair.dst, b"".join(pair.src.send(abort))) == [abort]


def test_a_source_may_close_a_further_connection_behind_whole_frames() -> None:
    pair = joined(3)
    assert same(feed(pair.dst, b"".join(pair.src.send(TABLE, 1)), 1), [TABLE])
    early = b"".join(pair.src.send(PAGES, 2))
    late = b"".join(pair.src.send(m.RoundEnd(0), 1))
    assert feed(pair.dst, late, 1) == []
    pair.dst.eof(1)
    assert pair.dst.next_event() is NEED_DATA
    assert same(feed(pair.dst, early, 2), [PAGES, m.RoundEnd(0)])


def test_a_number_that_only_a_closed_connection_could_have_brought_is_a_lost_link() -> None:
    pair = joined(3)
    assert same(feed(pair.dst, b"".join(pair.src.send(TABLE, 1)), 1), [TABLE])
    pair.src.send(PAGES, 1)  # never arrives
    for number in (0, 2):
        wire = b"".join(pair.src.send(PAGES, number))
        assert feed(pair.dst, wire, number) == []
    pair.dst.eof(1)
    assert pair.dst.next_event() == LinkClosed(orderly=False, connection=1)
    assert pair.dst.next_event() is NEED_DATA
    abort = m.Abort("cancelled", "", "source")
    assert feed(pair.dst, b"".join(pair.src.send(abort))) == [abort]


def test_a_number_that_nobody_brings_is_a_breach() -> None:
    pair = joined(2)
    for number in (0, 1):
        assert same(feed(pair.dst, b"".join(pair.src.send(STATE[number])), 0), [STATE[number]])
    pair.src.send(PAGES, 1)  # never written
    assert feed(pair.dst, b"".join(pair.src.send(PAGES, 1)), 1) == []
    pair.dst.put(b"".join(pair.src.send(PAGES, 0)))
    with pytest.raises(FrameError, match="link: expected sequence number 3"):
        pair.dst.next_event()


def test_a_cut_at_the_source_is_a_lost_link_until_everything_is_confirmed() -> None:
    for messages_said, verified, lost in (
        (STATE[:3], False, True),
        (STATE, False, True),
        (STATE, True, False),
    ):
        pair = joined(2)
        for message in messages_said:
            feed(pair.dst, b"".join(pair.src.send(message, 1)), 1)
        if verified:
            pair.say(Role.DESTINATION, m.Verified(DIGEST, 1000))
        pair.src.eof(1)
        closed = LinkClosed(orderly=False, connection=1)
        assert pair.src.next_event() == (closed if lost else NEED_DATA)


def test_the_end_of_a_further_connection_is_no_matter_once_all_has_arrived() -> None:
    pair = joined(2)
    for number, message in enumerate(STATE):
        feed(pair.dst, b"".join(pair.src.send(message, number % 2)), number % 2)
    pair.dst.eof(1)
    assert pair.dst.next_event() is NEED_DATA
    pair.say(Role.DESTINATION, m.Verified(DIGEST, 1000), m.Ready())
    pair.say(Role.SOURCE, m.Commit())


# --- joins ------------------------------------------------------------------------------------


def forged(**values: object) -> m.Join:
    return dataclasses.replace(m.Join(DIGEST, TOKEN, 1), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (forged(migration_id=bytes(15) + b"\1"), "unknown"),
        (forged(join_token=bytes(16)), "unknown"),
        (forged(join_token=TOKEN + b"\0"), "unknown"),
        (forged(connection=3), "extra"),
        (forged(connection=MAX_STREAMS - 1), "extra"),
        (forged(connection=2), "taken"),
    ],
)
def test_joins_that_are_not_wanted_change_nothing(wrong: m.Join, code: str) -> None:
    pair = greeted(3)
    join(pair.src, pair.dst, 2)
    account, state = dict(pair.dst.sent_bytes), pair.dst.state
    refused = pair.dst.admit(wrong)
    assert isinstance(refused, m.Refused)
    assert refused.code == code
    assert (pair.dst.sent_bytes, pair.dst.state) == (account, state)
    join(pair.src, pair.dst, 1)
    for number, message in enumerate(STATE):
        heard = feed(pair.dst, b"".join(pair.src.send(message, number % 3)), number % 3)
        assert same(heard, [message])


def test_nobody_joins_what_has_no_further_connections_or_is_not_under_way() -> None:
    for empty in (forged(), forged(join_token=b"")):
        for dst in (End(Role.DESTINATION), greeted(1).dst):
            refused = dst.admit(empty)
            assert isinstance(refused, m.Refused)
            assert refused.code == ("unknown" if empty.join_token else refused.code)
            assert not dst.may_send(FrameType.JOINED, 1)


@pytest.mark.parametrize("count", range(1, len(STATE) + 1))
def test_joins_come_before_the_guest_stops_or_not_at_all(count: int) -> None:
    pair = greeted(2)
    pair.say(Role.SOURCE, *STATE[:count])
    late = not isinstance(pair.dst.admit(forged()), m.Joined)
    assert late == (pair.dst.state not in (LinkState.SETUP, LinkState.PRECOPY))
    assert pair.src.may_send(FrameType.JOIN, 1) == (not late)


def test_joins_end_when_the_destination_says_so() -> None:
    pair = greeted(3)
    join(pair.src, pair.dst, 1)
    pair.dst.end_joining()
    refused = pair.dst.admit(forged(connection=2))
    assert isinstance(refused, m.Refused)
    assert refused.code == "late"
    assert same(feed(pair.dst, b"".join(pair.src.send(TABLE, 1)), 1), [TABLE])


def test_a_refused_connection_is_told_so_and_the_migration_goes_on() -> None:
    pair = greeted(2)
    pair.src.send(pair.src.join(1), 1)
    refused = m.Refused("late", "connections are no longer taken")
    frame = arrival(LinkConnection(Role.SOURCE, 1), message_bytes(refused))
    assert pair.src.take_answer(frame) == refused
    assert not pair.src.may_send(FrameType.PAGES, 1)
    with pytest.raises(LocalProtocolError, match="on connection 1"):
        pair.src.send(TABLE, 1)
    pair.say(Role.SOURCE, *STATE)


@pytest.mark.parametrize("wrong", [m.KeepAlive(), m.Ack(0, 0), welcome()])
def test_another_answer_to_join_concerns_only_its_connection(wrong: Message) -> None:
    pair = greeted(2)
    pair.src.send(pair.src.join(1), 1)
    frame = arrival(LinkConnection(Role.SOURCE, 1), message_bytes(wrong))
    with pytest.raises(UnexpectedMessageError, match="JOINED or REFUSED"):
        pair.src.take_answer(frame)
    pair.say(Role.SOURCE, *STATE)


def message_bytes(message: Message, seq: int = 0) -> bytes:
    return b"".join(encode_frame(message.frame_type, seq, *encode_message(message)))


def test_a_source_joins_only_what_was_agreed_upon() -> None:
    with pytest.raises(LocalProtocolError, match="not agreed upon"):
        End(Role.SOURCE).join(1)
    pair = greeted(2)
    with pytest.raises(LocalProtocolError, match="not agreed upon"):
        pair.src.join(2)
    join(pair.src, pair.dst, 1)
    with pytest.raises(LocalProtocolError, match="cannot send JOIN"):
        pair.src.send(pair.src.join(1), 1)


@pytest.mark.parametrize(
    "answer",
    [
        dataclasses.replace(welcome(), streams=4, join_token=TOKEN),
        dataclasses.replace(welcome(), streams=1, join_token=TOKEN),
        dataclasses.replace(welcome(), streams=2, join_token=b""),
        dataclasses.replace(welcome(), streams=2, join_token=bytes(15)),
    ],
)
def test_a_welcome_grants_no_more_streams_than_wished_and_a_token_with_them(
    answer: m.Welcome,
) -> None:
    pair = Pair()
    pair.say(Role.SOURCE, dataclasses.replace(HELLO, streams=3))
    with pytest.raises(LocalProtocolError):
        pair.dst.send(answer)
    with pytest.raises(MessageError):
        feed(pair.src, message_bytes(answer))


# --- what goes where --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [m.Commit(), m.SourceDone(), m.Bye(), m.Abort("x", "", "source"), HELLO, forged()],
)
def test_control_messages_go_over_the_first_connection(message: Message) -> None:
    pair = joined(2)
    with pytest.raises(LocalProtocolError):
        pair.src.send(message, 1)
    with pytest.raises(UnexpectedMessageError, match="of connection 1"):
        feed(pair.dst, message_bytes(message), 1)
    assert pair.dst.state is LinkState.ERROR


def test_keep_alives_go_over_every_connection() -> None:
    pair = joined(2)
    for near, far in ((pair.src, pair.dst), (pair.dst, pair.src)):
        assert feed(far, b"".join(near.send(m.KeepAlive(), 1)), 1) == [m.KeepAlive()]
    pair.say(Role.SOURCE, m.Abort("x", "", "source"))
    assert not pair.src.may_send(FrameType.KEEPALIVE, 1)


def test_a_connection_that_did_not_join_carries_nothing() -> None:
    pair = joined(2)
    pair.dst.connections[2] = LinkConnection(Role.DESTINATION, 2)
    with pytest.raises(UnexpectedMessageError):
        feed(pair.dst, message_bytes(TABLE, 1), 2)


def test_a_connection_that_was_admitted_carries_nothing_before_it_is_told_so() -> None:
    pair = greeted(2)
    pair.dst.admit(forged())
    pair.dst.connections[1] = LinkConnection(Role.DESTINATION, 1)
    with pytest.raises(UnexpectedMessageError):
        feed(pair.dst, message_bytes(TABLE, 1), 1)


def test_what_came_before_its_number_was_known_counts_for_its_connection() -> None:
    pair = joined(2)
    pair.dst.connections[1] = LinkConnection(Role.DESTINATION)  # as accepted: number 0
    with pytest.raises(UnexpectedMessageError, match="of connection 1"):
        feed(pair.dst, message_bytes(m.Bye()), 1)


def test_an_abort_overtakes_pages_and_these_are_dropped() -> None:
    pair = joined(2)
    pair.say(Role.SOURCE, TABLE)
    late = [b"".join(pair.src.send(PAGES, 1)) for _ in range(3)]
    abort = m.Abort("cancelled", "by the user", "source")
    assert feed(pair.dst, late[0] + late[2][:30], 1)
    assert feed(pair.dst, b"".join(pair.src.send(abort))) == [abort]
    assert feed(pair.dst, late[2][30:] + late[1], 1) == []
    pair.say(Role.DESTINATION, m.Bye())
    pair.say(Role.SOURCE, m.Bye())
    assert pair.both_closed()


def test_pages_that_wait_for_one_before_them_are_dropped_with_an_abort() -> None:
    pair = joined(2)
    pair.say(Role.SOURCE, TABLE)
    missing = b"".join(pair.src.send(PAGES))
    assert feed(pair.dst, b"".join(pair.src.send(PAGES, 1)), 1) == []
    abort = m.Abort("cancelled", "by the user", "source")
    assert feed(pair.dst, missing + b"".join(pair.src.send(abort)))[-1] == abort
    pair = joined(2)
    pair.say(Role.SOURCE, TABLE)
    pair.src.send(PAGES)
    assert feed(pair.dst, b"".join(pair.src.send(PAGES, 1)), 1) == []
    assert feed(pair.dst, b"".join(pair.src.send(abort))) == [abort]
    assert pair.dst.next_event() is NEED_DATA


def test_a_frame_that_no_connection_can_bring_any_more_is_missed() -> None:
    pair = joined(2)
    pair.say(Role.SOURCE, TABLE)
    wires = [b"".join(pair.src.send(PAGES, number)) for number in (0, 1, 0)]
    assert feed(pair.dst, wires[1], 1) == []
    with pytest.raises(FrameError, match="link: expected sequence number 2"):
        feed(pair.dst, wires[2])
    assert pair.dst.state is LinkState.ERROR


def test_numbers_grow_on_every_connection_and_come_once() -> None:
    for number in (0, 1):
        pair = joined(2)
        pair.say(Role.SOURCE, TABLE)
        wires = [b"".join(pair.src.send(PAGES, 1)) for _ in range(2)]
        assert feed(pair.dst, wires[1], 1) == []
        with pytest.raises(FrameError):
            feed(pair.dst, wires[1] if number else wires[0], 1)


def test_nothing_numbered_is_held_before_the_migration_is_agreed_upon() -> None:
    end = End(Role.DESTINATION)
    with pytest.raises(UnexpectedMessageError, match="legal in state start"):
        feed(end, message_bytes(PAGES, 5))
    assert end.sequence.held_bytes == 0


@given(st.data(), st.sampled_from(m.CommitKind))
def test_mutated_conversations_over_two_connections_give_only_remote_protocol_errors(
    data: st.DataObject, kind: m.CommitKind
) -> None:
    pair = joined(2, kind)
    said = data.draw(st.lists(messages(), max_size=3))
    wires = [bytearray(), bytearray()]
    for message in (*STATE[: data.draw(st.integers(0, len(STATE)))], *said):
        at = data.draw(st.integers(0, 1))
        if isinstance(message, m.PrecopyAgain):
            message = m.PrecopyAgain(pair.src.turns + 1)  # noqa: PLW2901
        if pair.src.may_send(message.frame_type, at):
            wires[at] += b"".join(pair.src.send(message, at))
    for wire in wires:
        for _ in range(data.draw(st.integers(0, 2)) if wire else 0):
            wire[data.draw(st.integers(0, len(wire) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        for number in data.draw(st.permutations([0, 1])):
            feed(pair.dst, bytes(wires[number]), number)
            pair.dst.eof(number)
        while pair.dst.next_event() is not NEED_DATA:
            if isinstance(pair.dst.next_event(), LinkClosed):
                break
    except RemoteProtocolError:
        assert pair.dst.state is LinkState.ERROR
