"""Two ends of a link without a network, and ways to bring an end into any state."""

import dataclasses
import itertools

from proto.guest_events import NEED_DATA, OpaqueKind
from proto.link import messages as m
from proto.link.connection import LinkConnection
from proto.link.dispatch import FRAMES, encode_message
from proto.link.exchange import Event, LinkClosed
from proto.link.frames import Buffer, Frame, FrameType, encode_frame
from proto.link.messages import Message
from proto.link.pages import PageBatch
from proto.link.session import LinkSession
from proto.link.state import Direction, LinkState, Role, next_state
from proto.link.strangers import decode_later
from proto.link.vocabulary import PRECOPY_AGAIN
from tests.strategies import BLOCKS, CACHE_SLOTS, page_array, receive, same_message

DIGEST = bytes(16)
HELLO = m.Hello(DIGEST, 1, CACHE_SLOTS, {"smp": 2}, optional=("a", "b", PRECOPY_AGAIN))
TABLE = m.RamBlockTable(BLOCKS, b"start section")
PAGES = PageBatch(
    0,
    zero_pages=page_array([0, 1, 5]),
    same_count=2,
    ref_pages=page_array([2]),
    ref_slots=page_array([9]),
    literal_pages=page_array([3, 4]),
    literal_slots=page_array([7, 0xFFFF_FFFF]),
    encoded=(bytes(4096), bytes(4096)),
    delta_pages=page_array([6]),
    delta_bases=page_array([8]),
    delta_encoded=bytes(4096),
)
STATE: list[Message] = [
    m.OpaqueData(OpaqueKind.HEADER, b"QEVM", 4),
    TABLE,
    PAGES,
    m.RoundEnd(0),
    m.OpaqueData(OpaqueKind.COMMAND, b"x", 500, codec_id=3),
    m.Switchover(b"prelude"),
    PAGES,
    m.DeviceStateData(b"device", 6),
    m.EndOfState("running", DIGEST, DIGEST, 1000, True),
]


def welcome(kind: m.CommitKind = m.CommitKind.HELD, slots: int = CACHE_SLOTS) -> m.Welcome:
    return m.Welcome(kind.value, slots, None, "not asked", capabilities=(PRECOPY_AGAIN,))


class End(LinkSession):
    """One end of a link with the receiving halves of its connections."""

    def __init__(self, role: Role, *, capabilities: frozenset[str] = frozenset()) -> None:
        super().__init__(role, capabilities=capabilities)
        self.connections = {0: LinkConnection(role)}

    @property
    def received_bytes(self) -> int:
        return sum(connection.received_bytes for connection in self.connections.values())

    def put(self, data: Buffer, number: int = 0) -> None:
        """Have bytes arrive on a connection."""
        rest, connection = data, self.connections[number]
        while True:
            while (arrival := connection.next_arrival()) is not NEED_DATA:
                assert not isinstance(arrival, type(NEED_DATA))
                self.receive(arrival, number)
            if connection.ended or not len(rest):
                return
            rest = rest[receive(rest, connection.get_buffer, connection.buffer_updated) :]

    def eof(self, number: int = 0) -> None:
        """Have a connection end."""
        self.connections[number].eof()
        self.put(b"", number)


def feed(end: End, data: Buffer, number: int = 0) -> list[Event]:
    """Give an end bytes and take every event they make."""
    end.put(data, number)
    events: list[Event] = []
    while (event := end.next_event()) is not NEED_DATA:
        assert not isinstance(event, type(NEED_DATA))
        events.append(event)
        if isinstance(event, LinkClosed):
            break
    return events


def arrival(connection: LinkConnection, wire: bytes) -> Frame:
    """The only frame in these bytes."""
    connection.get_buffer()[: len(wire)] = wire
    connection.buffer_updated(len(wire))
    frame = connection.next_arrival()
    assert isinstance(frame, Frame)
    assert connection.next_arrival() is NEED_DATA
    return frame


def join(near: End, far: End, number: int) -> None:
    """Open a further connection between two ends that have agreed upon it."""
    wire = b"".join(near.send(near.join(number), number))
    stranger = LinkConnection(Role.DESTINATION)
    assert decode_later(arrival(stranger, wire)) == near.join(number)
    stranger.number = number
    far.connections[number] = stranger
    answer = far.admit(near.join(number))
    assert answer == m.Joined()
    near.connections[number] = LinkConnection(Role.SOURCE, number)
    back = b"".join(far.send(answer, number))
    assert near.take_answer(arrival(near.connections[number], back)) == answer


class Pair:
    """Both ends; every message goes through both and must arrive as it was sent."""

    def __init__(self, kind: m.CommitKind = m.CommitKind.HELD) -> None:
        self.ends = {role: End(role) for role in Role}
        self.src, self.dst = self.ends[Role.SOURCE], self.ends[Role.DESTINATION]
        self.kind = kind
        self.said = {Role.SOURCE: b"", Role.DESTINATION: b""}

    def say(self, role: Role, *said: Message) -> None:
        other = Role.DESTINATION if role is Role.SOURCE else Role.SOURCE
        for message in said:
            data = b"".join(self.ends[role].send(message))
            self.said[role] += data
            heard = feed(self.ends[other], data)
            assert len(heard) == 1
            assert not isinstance(heard[0], LinkClosed)
            assert same_message(heard[0], message)

    def greet(self) -> "Pair":
        wish = "relay" if self.kind is m.CommitKind.RELAYED else "auto"
        self.say(Role.SOURCE, dataclasses.replace(HELLO, commit=wish))
        self.say(Role.DESTINATION, welcome(self.kind))
        return self

    def complete(self) -> "Pair":
        self.greet().say(Role.SOURCE, *STATE)
        return self

    def verified(self) -> "Pair":
        self.complete().say(Role.DESTINATION, m.Verified(DIGEST, 1000))
        return self

    def both_closed(self) -> bool:
        return self.src.state is self.dst.state is LinkState.CLOSED


EXAMPLES: dict[FrameType, Message] = {
    message.frame_type: message
    for message in [
        *STATE,
        m.PrecopyAgain(1),
        HELLO,
        m.Commit(),
        m.SourceDone(),
        m.DigestQuery((m.DigestRange(0, 0, 1, DIGEST),)),
        welcome(),
        m.Refused("busy", "another migration is under way"),
        m.Ack(0, 0),
        m.ReturnPath(b"pong"),
        m.Verified(DIGEST, 1000),
        m.Mismatch(DIGEST, DIGEST, 1000),
        m.DigestReply(()),
        m.Ready(),
        m.Running("running"),
        m.OldCopy(0, b"", is_last=True),
        m.Recover(DIGEST, b"token", "COMMIT_SENT"),
        m.Recovered("ABORTED", "source", None, "its copy is dead"),
        m.KeepAlive(),
        m.Abort("cancelled", "by the user", "source"),
        m.Join(DIGEST, bytes(16), 1),
        m.Joined(),
        m.Resume(DIGEST, bytes(16), 1, 1),
        m.Resumed(0, 0, 1),
        m.Bye(),
    ]
}
UNGREETED = (LinkState.START, LinkState.GREETING)
PREFIX = (FrameType.HELLO, FrameType.WELCOME, FrameType.RAM_BLOCKS)
Steps = tuple[tuple[FrameType, Direction], ...]


def example(frame_type: FrameType, kind: m.CommitKind) -> Message:
    if frame_type is FrameType.WELCOME:
        return welcome(kind)
    if frame_type is FrameType.HELLO and kind is m.CommitKind.RELAYED:
        return dataclasses.replace(HELLO, commit="relay")
    return EXAMPLES[frame_type]


def step(end: End, frame_type: FrameType, direction: Direction, kind: m.CommitKind) -> None:
    """Let an end say or hear a message."""
    message = example(frame_type, kind)
    if direction is Direction.SENT:
        end.send(message)
        return
    header, payload = encode_message(message)
    seq = end.sequence.received_seq + 1 if FRAMES[frame_type].numbered else 0
    feed(end, b"".join(encode_frame(frame_type, seq, header, payload)))


def walks(role: Role, kind: m.CommitKind) -> dict[LinkState, Steps]:
    """A way to every state a role can reach, past RAM_BLOCKS where there is one."""

    def spread(found: dict[LinkState, Steps]) -> dict[LinkState, Steps]:
        for state in (todo := list(found)):
            known = None if state in UNGREETED else kind
            for frame_type, direction in itertools.product(FrameType, Direction):
                after = next_state(role, known, state, frame_type, direction)
                if after is not None and after not in found:
                    found[after] = (*found[state], (frame_type, direction))
                    todo.append(after)
        return found

    own = dict.fromkeys(PREFIX[::2] if role is Role.SOURCE else PREFIX[1::2], Direction.SENT)
    prefix = tuple((t, own.get(t, Direction.RECEIVED)) for t in PREFIX)
    ways = spread({LinkState.START: ()})
    return ways | spread({LinkState.PRECOPY: prefix})


def end_in(role: Role, kind: m.CommitKind, way: Steps) -> End:
    end = End(role)
    for frame_type, direction in way:
        step(end, frame_type, direction, kind)
    return end
