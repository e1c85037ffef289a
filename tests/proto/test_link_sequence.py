import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proto.errors import FrameError, LocalProtocolError, MessageError
from proto.link.sequence import ReceiveSequence, SendWindow


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


@given(st.integers(0, 5), st.integers(0, 1 << 64))
def test_only_the_next_number_is_accepted(received: int, seq: int) -> None:
    sequence = ReceiveSequence()
    for number in range(1, received + 1):
        sequence.accept(number)
    if seq == received + 1:
        sequence.accept(seq)
        assert sequence.received_seq == seq
    else:
        with pytest.raises(FrameError, match=f"sequence number {received + 1}"):
            sequence.accept(seq)
        assert sequence.received_seq == received


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
