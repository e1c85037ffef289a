import pytest

from migrate.errors import GuestError
from migrate.splicing import Splice
from proto.guest_events import (
    DeviceState,
    End,
    GuestEvent,
    Opaque,
    OpaqueKind,
    RamBlock,
    RamBlocks,
    RoundEnd,
    Switchover,
)

HEADER = Opaque(OpaqueKind.HEADER, b"QEVM pc-q35-7.2")
RETURN_PATH = Opaque(OpaqueKind.OPEN_RETURN_PATH, b"open")
PING = Opaque(OpaqueKind.COMMAND, b"ping 1")
BLOCKS = (RamBlock("pc.ram", 1 << 20), RamBlock("vga.vram", 1 << 16))
START: list[GuestEvent] = [HEADER, RETURN_PATH, PING, RamBlocks(BLOCKS, b"start of section 2")]
BODY: list[GuestEvent] = [
    RoundEnd(0),
    PING,
    Switchover(),
    DeviceState(b"devices"),
    End("running"),
]


def test_the_first_stream_passes_whole() -> None:
    splice = Splice()
    assert splice.take(START) + splice.take(BODY) == START + BODY


@pytest.mark.parametrize("cut", range(len(START) + 1))
def test_of_another_stream_what_follows_the_block_list_passes(cut: int) -> None:
    splice = Splice()
    splice.take(START)
    for _ in range(2):
        splice.begin_another()
        again = [*START[:-1], RamBlocks(BLOCKS, b"start of section 3"), *BODY]
        assert splice.take(again[:cut]) == []
        assert splice.take(again[cut:]) == BODY


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (Opaque(OpaqueKind.HEADER, b"QEVM pc-q35-10.0"), "the machine changed"),
        (RamBlocks(BLOCKS[::-1], b""), "the RAM blocks changed"),
        (RamBlocks(BLOCKS[:1], b""), "the RAM blocks changed"),
        (Opaque(OpaqueKind.REST, b"", "dirty-bitmap"), "what the first had not"),
    ],
)
def test_a_stream_that_does_not_go_on_with_the_first_is_refused(
    event: GuestEvent, why: str
) -> None:
    splice = Splice()
    splice.take(START)
    splice.begin_another()
    with pytest.raises(GuestError, match=why):
        splice.take([event])
