from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proto.errors import FrameError, LocalProtocolError, MessageError
from proto.limits import FRAME_HEADER_BYTES, MAX_AHEAD_BYTES, MAX_AHEAD_FRAMES
from proto.link.frames import Frame, FrameType
from proto.link.sequence import LARGEST_FRAME_BYTES, ReceiveSequence, SendWindow


class WindowAgainstLists(RuleBasedStateMachine):
    """The window against the obvious model: a list of every frame ever sent."""

    def __init__(self) -> None:
        super().__init__()
        self.window = SendWindow()
        self.frames: list[tuple[list[bytes], int]] = []
        self.received = 0
        self.consumed = 0

    @rule(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=3), raw=st.integers(0, 99))
    def send(self, sizes: list[int], raw: int) -> None:
        buffers = [bytes(size) for size in sizes]
        self.frames.append((buffers, raw))
        self.window.add(self.window.next_seq, buffers, raw)

    @rule(received=st.integers(-1, 12), consumed=st.integers(-1, 12))
    def acknowledge(self, received: int, consumed: int) -> None:
        legal = self.received <= received <= len(self.frames)
        legal = legal and self.consumed <= consumed <= received
        if legal:
            self.window.on_ack(received, consumed)
            self.received, self.consumed = received, consumed
        else:
            with pytest.raises(MessageError):
                self.window.on_ack(received, consumed)

    @invariant()
    def accounts_close(self) -> None:
        sizes = [sum(map(len, buffers)) for buffers, _ in self.frames]
        assert self.window.sent_seq == len(self.frames)
        assert self.window.retained_bytes == sum(sizes[self.received :])
        assert self.window.outstanding_wire_bytes == sum(sizes[self.consumed :])
        assert self.window.outstanding_raw_bytes == sum(
            raw for _, raw in self.frames[self.consumed :]
        )
        kept = self.window.unreceived()
        assert [frame.seq for frame in kept] == list(
            range(self.received + 1, len(self.frames) + 1)
        )
        for frame in kept:
            buffers, raw = self.frames[frame.seq - 1]
            assert all(a is b for a, b in zip(frame.buffers, buffers, strict=True))
            assert (frame.raw_bytes, frame.wire_bytes) == (raw, sizes[frame.seq - 1])


TestWindowAgainstLists = WindowAgainstLists.TestCase


def test_frames_are_added_in_order_only() -> None:
    window = SendWindow()
    window.add(1, [b"x"], 0)
    for wrong in (0, 1, 3):
        with pytest.raises(LocalProtocolError, match="next frame is 2"):
            window.add(wrong, [b"x"], 0)
    assert window.sent_seq == 1


def frame(seq: int, connection: int = 0, size: int = 0) -> Frame:
    return Frame(FrameType.ROUND_END, seq, b"", bytes(size), 0, connection)


def take_all(sequence: ReceiveSequence) -> list[Frame]:
    taken = []
    while (due := sequence.next_frame()) is not None:
        sequence.accept(due.seq)
        taken.append(due)
    return taken


@given(st.integers(0, 5), st.integers(1, 1 << 64))
def test_on_one_connection_only_the_next_number_may_come(received: int, seq: int) -> None:
    sequence = ReceiveSequence()
    for number in range(1, received + 1):
        sequence.hold(frame(number))
        assert [due.seq for due in take_all(sequence)] == [number]
    if seq == received + 1:
        sequence.hold(frame(seq))
        assert [due.seq for due in take_all(sequence)] == [seq]
    else:
        with pytest.raises(FrameError, match=f"sequence number {received + 1}"):
            sequence.hold(frame(seq))
        assert sequence.received_seq == received


@given(st.data(), st.integers(1, 4), st.lists(st.integers(0, 3), max_size=30))
def test_frames_of_several_connections_come_out_in_order_however_these_overtake_each_other(
    data: st.DataObject, connections: int, chosen: list[int]
) -> None:
    sequence = ReceiveSequence()
    for number in range(1, connections):
        sequence.open(number)
    queues: dict[int, deque[Frame]] = {number: deque() for number in range(connections)}
    for seq, choice in enumerate(chosen, 1):
        queues[choice % connections].append(frame(seq, choice % connections, seq))
    taken, arrived = [], set[int]()
    while filled := [number for number, queue in queues.items() if queue]:
        coming = queues[data.draw(st.sampled_from(filled))].popleft()
        sequence.hold(coming)
        arrived.add(coming.seq)
        taken += take_all(sequence)
        in_order = next(n for n in range(1, len(chosen) + 2) if n not in arrived) - 1
        assert sequence.received_seq == len(taken) == in_order
        held = [seq for seq in arrived if seq > in_order]
        assert sequence.held_bytes == sum(24 + seq for seq in held)
    assert [due.seq for due in taken] == list(range(1, len(chosen) + 1))


class ReceiveAgainstSets(RuleBasedStateMachine):
    """Frames of any numbers on three connections: each is taken once, or refused for a reason."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = ReceiveSequence()
        self.sequence.open(1)
        self.sequence.open(2)
        self.newest = [0, 0, 0]
        self.came: set[int] = set()
        self.taken = 0

    @rule(seq=st.integers(1, 12), connection=st.integers(0, 2))
    def arrive(self, seq: int, connection: int) -> None:
        if seq <= self.newest[connection] or seq in self.came:
            with pytest.raises(FrameError):
                self.sequence.hold(frame(seq, connection))
            return
        self.sequence.hold(frame(seq, connection))
        self.newest[connection] = seq
        self.came.add(seq)

    @rule()
    def take(self) -> None:
        due = self.taken + 1
        if due in self.came:
            found = self.sequence.next_frame()
            assert found is not None
            assert found.seq == due
            self.sequence.accept(due)
            self.taken = due
        elif min(self.newest) > due:
            with pytest.raises(FrameError, match=f"link: expected sequence number {due}"):
                self.sequence.next_frame()
        else:
            assert self.sequence.next_frame() is None
        assert self.sequence.received_seq == self.taken


TestReceiveAgainstSets = ReceiveAgainstSets.TestCase


def test_what_is_far_ahead_is_refused() -> None:
    sequence = ReceiveSequence()
    sequence.open(1)
    sequence.open(2)
    with pytest.raises(FrameError, match=f"below {1 + MAX_AHEAD_FRAMES}, got"):
        sequence.hold(frame(1 + MAX_AHEAD_FRAMES, 1))
    sequence.hold(frame(MAX_AHEAD_FRAMES, 1))
    rest = MAX_AHEAD_BYTES - sequence.held_bytes
    sequence.hold(frame(2, 0, rest - 2 * FRAME_HEADER_BYTES))
    with pytest.raises(FrameError, match=f"at most {MAX_AHEAD_BYTES} bytes ahead"):
        sequence.hold(frame(3, 0, 1))
    sequence.hold(frame(3, 0))
    assert sequence.held_bytes == MAX_AHEAD_BYTES
    assert sequence.next_frame() is None


def test_the_frame_that_is_missing_is_taken_however_much_waits_for_it() -> None:
    sequence = ReceiveSequence()
    sequence.open(1)
    sequence.hold(frame(2, 1, MAX_AHEAD_BYTES - FRAME_HEADER_BYTES))
    sequence.hold(frame(1, 0, 4096))
    assert [due.seq for due in take_all(sequence)] == [1, 2]
    assert sequence.held_bytes == 0


def test_frames_are_counted_in_order_only() -> None:
    sequence = ReceiveSequence()
    with pytest.raises(LocalProtocolError, match="next frame is 1"):
        sequence.accept(2)


def test_a_window_takes_no_more_than_the_other_end_would_hold() -> None:
    window = SendWindow()
    for seq in range(1, MAX_AHEAD_FRAMES + 1):
        assert not window.is_full
        window.add(seq, [b"x"], 0)
    with pytest.raises(LocalProtocolError, match="too much is not confirmed"):
        window.add(MAX_AHEAD_FRAMES + 1, [b"x"], 0)
    window.on_ack(1, 0)
    window.add(MAX_AHEAD_FRAMES + 1, [b"x"], 0)


def test_a_window_keeps_room_for_one_frame_of_the_largest_kind() -> None:
    window = SendWindow()
    large = bytes(MAX_AHEAD_BYTES - LARGEST_FRAME_BYTES)
    window.add(1, [large], 0)
    window.add(2, [bytes(LARGEST_FRAME_BYTES)], 0)
    assert window.retained_bytes == MAX_AHEAD_BYTES
    with pytest.raises(LocalProtocolError, match="too much is not confirmed"):
        window.add(3, [b"x"], 0)
    window.on_ack(1, 0)
    window.add(3, [b"x"], 0)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=6))
def test_our_acknowledgements_never_move_backwards_or_ahead(
    acks: list[tuple[int, int]],
) -> None:
    sequence = ReceiveSequence()
    for number in range(1, 6):
        sequence.accept(number)
    last = (0, 0)
    for received, consumed in acks:
        if last[0] <= received <= 5 and last[1] <= consumed <= received:
            sequence.acknowledge(received, consumed)
            last = (received, consumed)
        else:
            with pytest.raises(LocalProtocolError):
                sequence.acknowledge(received, consumed)
