"""A link that is cut anywhere, any number of times: everything is heard once and in order."""

import dataclasses
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import LocalProtocolError, MessageError, RemoteProtocolError
from proto.guest_events import NEED_DATA
from proto.limits import CONFIRM_CONTROL_BYTES, MAX_CONTROL_BYTES, MAX_OLD_COPY_BYTES
from proto.link import messages as m
from proto.link.connection import LinkConnection
from proto.link.control import UNCOUNTED
from proto.link.dispatch import FRAMES
from proto.link.exchange import LinkClosed
from proto.link.frames import Buffer, FrameType
from proto.link.messages import Message
from proto.link.state import JOINABLE, TURNABLE, LinkState, Role
from proto.link.strangers import UNKNOWN, decode_later
from tests.link_pair import DIGEST, HELLO, PAGES, STATE, TABLE, End, arrival, feed, welcome
from tests.strategies import same_message

TOKEN = bytes(range(16, 32))
JOIN_TOKEN = bytes(range(16))
OFFER = dataclasses.replace(HELLO, resume_token=TOKEN, vm_id="vm")
ROUND: list[Message] = [PAGES, m.RoundEnd(0)]
MANY: list[Message] = [*STATE[:2], *ROUND * 4, *STATE[2:]]


def counted(message: Message) -> bool:
    return not FRAMES[message.frame_type].numbered and message.frame_type not in UNCOUNTED


class World:
    """Both ends, the bytes under way between them, and what was said and heard."""

    def __init__(self, data: st.DataObject, streams: int) -> None:
        self.data = data
        self.streams = streams
        self.ends = {role: End(role) for role in Role}
        self.said: dict[Role, list[Message]] = {role: [] for role in Role}
        self.heard: dict[Role, list[Message]] = {role: [] for role in Role}
        self.numbered = list(MANY)
        self.old_pages = 0
        # bytes under way, by who says them and over which connection
        self.under_way: dict[tuple[Role, int], bytearray] = defaultdict(bytearray)
        self.say(Role.SOURCE, dataclasses.replace(OFFER, streams=streams))

    @property
    def src(self) -> End:
        return self.ends[Role.SOURCE]

    @property
    def dst(self) -> End:
        return self.ends[Role.DESTINATION]

    def say(self, role: Role, message: Message, number: int = 0) -> None:
        buffers = self.ends[role].send(message, number)
        self.said[role].append(message)
        self.write(role, buffers, number)

    def write(self, role: Role, buffers: list[Buffer], number: int = 0) -> None:
        self.under_way[role, number] += b"".join(buffers)

    def deliver(self, role: Role, number: int, count: int) -> None:
        wire = self.under_way[role, number]
        piece, self.under_way[role, number] = bytes(wire[:count]), wire[count:]
        other = Role.DESTINATION if role is Role.SOURCE else Role.SOURCE
        for event in feed(self.ends[other], piece, number):
            assert not isinstance(event, LinkClosed)
            self.heard[role].append(event)

    def deliver_some(self) -> None:
        lanes = [lane for lane, wire in self.under_way.items() if wire]
        if lanes:
            role, number = self.data.draw(st.sampled_from(lanes))
            most = len(self.under_way[role, number])
            self.deliver(role, number, self.data.draw(st.integers(1, most)))

    # --- what each end says when it may ---

    def source_speaks(self) -> bool:
        state = self.src.state
        if self.numbered and (state is LinkState.SETUP or state in TURNABLE):
            now = self.numbered[0].frame_type
            open_ = [n for n in self.src.connections if self.src.may_send(now, n)]
            number = self.data.draw(st.sampled_from(open_)) if len(open_) > 1 else 0
            self.say(Role.SOURCE, self.numbered.pop(0), number)
        elif state is LinkState.READY:
            if not any(isinstance(x, m.SourceDone) for x in self.said[Role.SOURCE]):
                self.say(Role.SOURCE, m.SourceDone())
            self.say(Role.SOURCE, m.Commit())
        elif state in (LinkState.RUNNING, LinkState.BYE_RECEIVED):
            self.say(Role.SOURCE, m.Bye())
        else:
            return False
        return True

    def destination_speaks(self) -> bool:
        state = self.dst.state
        if state is LinkState.GREETING:
            token = JOIN_TOKEN if self.streams > 1 else b""
            answer = dataclasses.replace(
                welcome(), streams=self.streams, join_token=token, old_pages=6
            )
            self.say(Role.DESTINATION, answer)
        elif state in JOINABLE and self.old_pages < 6:
            self.say(Role.DESTINATION, m.OldCopy(self.old_pages, DIGEST))
            self.old_pages += 1
        elif state is LinkState.STATE_COMPLETE:
            self.say(Role.DESTINATION, m.Verified(DIGEST, 1000))
        elif state is LinkState.VERIFIED:
            self.say(Role.DESTINATION, m.Ready())
        elif state is LinkState.COMMITTING:
            self.say(Role.DESTINATION, m.Running("running"))
        elif state in (LinkState.RUNNING, LinkState.BYE_RECEIVED):
            self.say(Role.DESTINATION, m.Bye())
        else:
            return False
        return True

    def uncounted(self) -> None:
        """Say how things stand."""
        for role in Role:
            end = self.ends[role]
            if end.may_send(FrameType.KEEPALIVE):
                self.write(role, end.send(m.KeepAlive(end.control.heard)))
        if self.dst.may_send(FrameType.ACK):
            received = self.dst.sequence.received_seq
            self.write(Role.DESTINATION, self.dst.send(m.Ack(received, received // 2)))

    # --- cuts ---

    def cut(self) -> None:
        """Lose the end of what is under way, or all of it; of one connection or of several."""
        for (role, number), wire in list(self.under_way.items()):
            kept = self.data.draw(st.integers(0, len(wire)))
            self.deliver(role, number, kept)
        self.under_way.clear()
        for role, end in self.ends.items():
            end.connections = {0: LinkConnection(role)}
        turns = self.src.state in {*TURNABLE, LinkState.STATE_COMPLETE}
        turns = turns and self.src.turns < 3 and self.data.draw(st.booleans())
        if turns:
            self.src.turn_back()
        while self.src.resumable:
            if self.resume(self.data.draw(st.sampled_from(["all", "all", "no", "half"]))):
                break
        if turns:
            self.turn_back()

    def turn_back(self) -> None:
        """Go back to pre-copy, unless the destination has heard that nothing more comes."""
        assert (self.src.state in TURNABLE) == (self.dst.state in (LinkState.SETUP, *TURNABLE))
        if self.src.state not in TURNABLE:
            return
        said = self.said[Role.SOURCE]
        if isinstance(ended := said[-1], m.EndOfState):
            said.remove(ended)
        self.numbered = [m.PrecopyAgain(self.src.turns + 1), *ROUND * 2, *STATE[5:]]

    def resume(self, arrives: str) -> bool:
        """Try to go on: nothing arrives, only RESUME does, or its answer, too."""
        src = self.src
        resume = src.resume()
        asked = src.open_with(resume)
        if arrives == "no":
            return False
        stranger = LinkConnection(Role.DESTINATION)
        heard = decode_later(arrival(stranger, b"".join(asked)))
        assert isinstance(heard, m.Resume)
        assert heard == resume
        answer = self.dst.admit_resume(heard)
        if answer == UNKNOWN:
            assert self.dst.state is LinkState.START
            self.ends[Role.DESTINATION] = End(Role.DESTINATION)
            src.connections = {0: LinkConnection(Role.SOURCE)}
            self.write(Role.SOURCE, src.greet_again())
            return True
        if isinstance(answer, m.Refused):  # it has heard our BYE: there is nothing more to say
            assert (answer.code, src.state) == ("late", LinkState.BYE_SENT)
            return True
        dst = self.dst
        dst.connections = {0: stranger}
        back = dst.open_with(answer)
        if arrives == "half":
            dst.repeat()
            return False
        src.connections = {0: LinkConnection(Role.SOURCE)}
        kept = src.window.retained_bytes + src.control.kept_bytes
        before = src.sent_bytes["resent"]
        assert src.take_resumed(arrival(src.connections[0], b"".join(back))) == answer
        for buffers in dst.repeat():
            self.write(Role.DESTINATION, buffers)
        for buffers in src.repeat():
            self.write(Role.SOURCE, buffers)
        assert src.sent_bytes["resent"] - before <= kept
        ack = src.next_event()  # as if an ACK had come
        assert ack == m.Ack(answer.received_seq, answer.consumed_seq)
        self.join_again()
        return True

    def join_again(self) -> None:
        src, dst = self.src, self.dst
        if src.state not in JOINABLE or dst.state not in JOINABLE:
            return
        for number in range(1, self.streams):
            if number in src.connections:
                continue
            join = src.join(number)
            assert join.epoch == src.epoch == dst.epoch
            wire = b"".join(src.send(join, number))
            stranger = LinkConnection(Role.DESTINATION)
            assert decode_later(arrival(stranger, wire)) == join
            stranger.number = number
            dst.connections[number] = stranger
            answer = dst.admit(join)
            assert answer == m.Joined()
            src.connections[number] = LinkConnection(Role.SOURCE, number)
            back = b"".join(dst.send(answer, number))
            assert src.take_answer(arrival(src.connections[number], back)) == answer

    # --- the whole ---

    def run(self, cuts: int) -> None:
        for _ in range(cuts):
            for _ in range(self.data.draw(st.integers(0, 30))):
                act = self.data.draw(st.sampled_from("sssdwwwwuj"))
                if act == "s":
                    self.source_speaks()
                elif act == "d":
                    self.destination_speaks()
                elif act == "u":
                    self.uncounted()
                elif act == "j":
                    self.join_again()
                else:
                    self.deliver_some()
            if self.src.resumable:
                self.cut()
        while self.source_speaks() or self.destination_speaks() or any(self.under_way.values()):
            for (role, number), wire in list(self.under_way.items()):
                self.deliver(role, number, len(wire))


@given(st.data(), st.integers(1, 3), st.integers(1, 10))
def test_however_often_a_link_is_cut_everything_is_heard_once_and_in_order(
    data: st.DataObject, streams: int, cuts: int
) -> None:
    world = World(data, streams)
    world.run(cuts)
    # a last word may be lost with its connection, as any last word: then the other end ends it
    ended = {LinkState.CLOSED, LinkState.BYE_SENT}
    assert {world.src.state, world.dst.state} <= ended
    for role in Role:
        for kind in (True, False):
            said: list[Message] = [
                x for x in world.said[role] if FRAMES[x.frame_type].numbered is kind
            ]
            heard = [
                x
                for x in world.heard[role]
                if FRAMES[x.frame_type].numbered is kind and (kind or counted(x))
            ]
            if heard != said and said and isinstance(said[-1], m.Bye):
                said.pop()
            assert len(heard) == len(said)
            assert all(same_message(a, b) for a, b in zip(heard, said, strict=True))
    said = world.said[Role.SOURCE]
    assert world.dst.sequence.received_seq == sum(FRAMES[x.frame_type].numbered for x in said)
    assert world.src.turns == world.dst.turns
    assert world.dst.sequence.held_bytes == 0


def greeted() -> tuple[End, End]:
    src, dst = End(Role.SOURCE), End(Role.DESTINATION)
    feed(dst, b"".join(src.send(OFFER)))
    feed(src, b"".join(dst.send(dataclasses.replace(welcome(), old_pages=1 << 24))))
    return src, dst


def resumed(src: End, dst: End) -> m.Resumed:
    answer = dst.admit_resume(src.resume())
    assert isinstance(answer, m.Resumed)
    src.connections = {0: LinkConnection(Role.SOURCE)}
    dst.connections = {0: LinkConnection(Role.DESTINATION)}
    src.take_resumed(arrival(src.connections[0], b"".join(dst.open_with(answer))))
    assert isinstance(src.next_event(), m.Ack)
    return answer


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"migration_id": bytes(15) + b"\1"}, "unknown"),
        ({"resume_token": bytes(16)}, "unknown"),
        ({"resume_token": TOKEN + b"\0"}, "unknown"),
        ({"resume_token": JOIN_TOKEN}, "unknown"),
        ({"epoch": 1}, "old"),
        ({"heard": 2}, "protocol"),
    ],
)
def test_who_may_not_resume_changes_nothing(wrong: dict[str, object], code: str) -> None:
    src, dst = greeted()
    resumed(src, dst)
    feed(dst, b"".join(src.send(TABLE)))
    dst.repeat()
    right = src.resume()
    assert right.epoch == 2
    refused = dst.admit_resume(dataclasses.replace(right, **wrong))  # type: ignore[arg-type]
    assert isinstance(refused, m.Refused)
    assert refused.code == code
    assert dst.epoch == 1
    (event,) = feed(dst, b"".join(src.send(PAGES)))
    assert not isinstance(event, LinkClosed)
    assert same_message(event, PAGES)


def test_nothing_is_resumed_that_has_not_begun_or_is_over() -> None:
    src, dst = End(Role.SOURCE), End(Role.DESTINATION)
    with pytest.raises(LocalProtocolError):
        src.resume()
    assert dst.admit_resume(m.Resume(DIGEST, TOKEN, 1, 0)) == UNKNOWN
    feed(dst, b"".join(src.send(HELLO)))  # offers no token
    assert not src.resumable
    assert dst.admit_resume(m.Resume(DIGEST, TOKEN, 1, 0)) == UNKNOWN
    src, dst = greeted()
    right = src.resume()
    feed(dst, b"".join(src.send(m.Abort("cancelled", "", "source"))))
    assert not src.resumable
    answer = dst.admit_resume(right)
    assert isinstance(answer, m.Refused)
    assert answer.code == "late"
    with pytest.raises(LocalProtocolError, match="nothing can be resumed"):
        src.resume()


def test_hello_is_said_again_only_before_it_was_answered() -> None:
    src, _ = greeted()
    with pytest.raises(LocalProtocolError, match="HELLO was heard"):
        src.greet_again()


def test_what_arrived_of_an_epoch_and_was_not_taken_is_dropped_and_comes_again() -> None:
    src, dst = greeted()
    dst.put(b"".join(src.send(TABLE)))  # arrived, not taken
    answer = resumed(src, dst)
    assert answer.received_seq == 0
    assert dst.next_event() is NEED_DATA
    (again,) = src.repeat()
    assert feed(dst, b"".join(again)) == [TABLE]
    assert src.sent_bytes["resent"] == sum(map(len, again))


def test_a_resumed_that_claims_more_than_was_sent_is_refused_and_changes_nothing() -> None:
    for wrong in (m.Resumed(1, 0, 1), m.Resumed(0, 0, 2), m.Resumed(0, 1, 1)):
        src, dst = greeted()
        src.resume()
        frame = arrival(LinkConnection(Role.SOURCE), b"".join(dst.open_with(wrong)))
        with pytest.raises(MessageError):
            src.take_resumed(frame)
        assert src.epoch == 0
    src, dst = greeted()
    src.resume()
    other = arrival(LinkConnection(Role.SOURCE), b"".join(dst.send(m.KeepAlive())))
    with pytest.raises(RemoteProtocolError, match="RESUMED or REFUSED"):
        src.take_resumed(other)


def test_control_messages_are_kept_within_bounds_until_they_are_confirmed() -> None:
    src, dst = greeted()
    pages = MAX_OLD_COPY_BYTES // 16
    count = 0
    while dst.may_send(FrameType.OLD_COPY):
        wire = b"".join(dst.send(m.OldCopy(count * pages, bytes(MAX_OLD_COPY_BYTES))))
        if not count:
            assert not src.control.should_tell
        feed(src, wire)
        count += 1
        assert src.control.should_tell == (count * len(wire) >= CONFIRM_CONTROL_BYTES)
    assert MAX_CONTROL_BYTES <= dst.control.kept_bytes < MAX_CONTROL_BYTES + (2 << 20)
    with pytest.raises(LocalProtocolError, match="OLD_COPY"):
        dst.send(m.OldCopy(count * pages, DIGEST))
    assert dst.may_send(FrameType.ABORT)
    feed(dst, b"".join(src.send(m.KeepAlive(src.control.heard))))
    assert not src.control.should_tell
    assert dst.control.kept_bytes == 0
    assert dst.may_send(FrameType.OLD_COPY)


def test_a_peer_that_heard_more_than_was_said_breaks_the_protocol() -> None:
    src, dst = greeted()
    with pytest.raises(MessageError, match="at most 1 messages heard"):
        feed(dst, b"".join(src.send(m.KeepAlive(2))))


# --- back to pre-copy -----------------------------------------------------------------------------


def test_an_end_of_state_that_was_not_received_is_taken_back() -> None:
    src, dst = greeted()
    for message in STATE[:-1]:
        feed(dst, b"".join(src.send(message)))
    lost = src.send(STATE[-1])
    src.turn_back()
    resumed(src, dst)
    assert (src.state, dst.state) == (LinkState.DEVICE_STATE, LinkState.DEVICE_STATE)
    assert lost not in src.repeat()
    (again,) = feed(dst, b"".join(src.send(m.PrecopyAgain(1))))
    assert again == m.PrecopyAgain(1)
    assert (src.state, dst.state) == (LinkState.PRECOPY, LinkState.PRECOPY)
    assert src.window.sent_seq == dst.sequence.received_seq == len(STATE)
    for message in STATE[5:]:
        feed(dst, b"".join(src.send(message)))
    assert dst.state is LinkState.STATE_COMPLETE


def test_an_end_of_state_that_was_received_leaves_no_way_back() -> None:
    src, dst = greeted()
    for message in STATE:
        feed(dst, b"".join(src.send(message)))
    src.turn_back()
    resumed(src, dst)
    assert src.state is LinkState.STATE_COMPLETE
    assert not src.may_send(FrameType.PRECOPY_AGAIN)
    assert src.may_send(FrameType.ABORT)


def test_nothing_is_taken_back_that_nobody_wants_back() -> None:
    src, dst = greeted()
    for message in STATE[:-1]:
        feed(dst, b"".join(src.send(message)))
    lost = src.send(STATE[-1])
    resumed(src, dst)
    assert src.state is LinkState.STATE_COMPLETE
    assert lost in src.repeat()


@pytest.mark.parametrize("count", [2, 16])
def test_ways_back_are_counted(count: int) -> None:
    src, dst = greeted()
    feed(dst, b"".join(src.send(TABLE)))
    with pytest.raises(LocalProtocolError, match="count 1"):
        src.send(m.PrecopyAgain(count))
    src.turns = count - 1
    with pytest.raises(MessageError, match="count 1"):
        feed(dst, b"".join(src.send(m.PrecopyAgain(count))))


def test_there_is_no_way_back_that_was_not_agreed_upon() -> None:
    src, dst = End(Role.SOURCE), End(Role.DESTINATION)
    feed(dst, b"".join(src.send(OFFER)))
    feed(src, b"".join(dst.send(dataclasses.replace(welcome(), capabilities=()))))
    feed(dst, b"".join(src.send(TABLE)))
    with pytest.raises(LocalProtocolError, match="not agreed upon"):
        src.send(m.PrecopyAgain(1))


def test_a_frame_that_was_received_is_not_taken_back() -> None:
    src, dst = greeted()
    feed(dst, b"".join(src.send(TABLE)))
    resumed(src, dst)
    with pytest.raises(LocalProtocolError, match="frame 1 was received"):
        src.window.take_back()
    assert src.window.sent_seq == 1
