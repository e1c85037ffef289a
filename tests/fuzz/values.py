"""Fuzzing of what comes as values: QMP lines, compressed bytes, what a peer says of its machine."""

import json
import random
from collections.abc import Callable
from typing import Any, Final

from migrate.qemu.machine_facts import BalloonFacts, CpuFacts, Device, MachineFacts
from migrate.qemu.preflight import compare
from migrate.qemu.queries import RamBlockInfo
from proto.codecs import CodecId, decode_into, make_codec
from proto.errors import CodecError, MessageError, QmpProtocolError
from proto.guest_events import NEED_DATA, PAGE_SIZE
from proto.qemu.hmp import parse_host_address, parse_memory
from proto.qemu.qmp import ErrorReply, Event, Greeting, QmpReader, Reply
from tests.fuzz.mutation import changed, damage, number, pieces
from tests.fuzz.promises import says_again

Case = Callable[[random.Random], str]

MAX_LINE_BYTES: Final = 100_000

GREETING: Final[dict[str, Any]] = {
    "QMP": {
        "version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"},
        "capabilities": ["oob"],
    }
}
TIMESTAMP: Final = {"seconds": 1_700_000_000, "microseconds": 250}
LINES: Final[list[dict[str, Any]]] = [
    GREETING,
    {"return": {}, "id": 1},
    {"return": [{"a": "é", "b": [1.5, None, True]}], "id": 2},
    {"return": {"status": "active", "ram": {"remaining": 2**40, "mbps": 0.1}}, "id": 3},
    {"id": 3, "error": {"class": "GenericError", "desc": "no"}},
    {"error": {"class": "GenericError", "desc": "Invalid JSON syntax"}},
    {"timestamp": TIMESTAMP, "event": "STOP"},
    {"timestamp": {"seconds": -1, "microseconds": -1}, "event": "MIGRATION", "data": {"a": 1}},
]
ODD_TEXTS: Final = (
    *(b"[" * 5000, b'{"a":' * 3000, b'{"return": ' + b"9" * 5000 + b"}", b"\xff\xfe{}", b""),
    *(b'{"return": 1e999, "id": 1}', b'{"return": "\\ud800"}', b"NaN", b'{"return": NaN}'),
    *(b'{"return": 1, "return": 2}', b"null", b'"', b"\x00", b'{"id": 1}', b" " * 3000),
)


def qmp() -> Case:
    """Lines of a monitor: messages or ``QmpProtocolError``."""
    greeting = json.dumps(GREETING).encode() + b"\r\n"

    def case(rng: random.Random) -> str:
        if rng.random() < 0.05:
            return _hmp(rng)
        lines = [greeting] if rng.random() < 0.85 else []
        lines += [_line(rng) for _ in range(rng.randint(1, 5))]
        data = b"".join(lines)
        if rng.random() < 0.2:
            data = damage(rng, data, rng.choice(ODD_TEXTS), head=200)
        return _read(rng, data)

    return case


def _line(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.05:
        return rng.choice(ODD_TEXTS) + b"\n"
    value: Any = rng.choice(LINES)
    if kind < 0.6:
        value = changed(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    raw = text.encode("utf-8", "surrogatepass")
    if kind > 0.9:
        raw = damage(rng, raw, b'{"event": [', head=60)
    return raw + rng.choice((b"\n", b"\r\n", b"\n\n", b" \r\n"))


def _read(rng: random.Random, data: bytes) -> str:
    reader, heard = QmpReader(max_line_bytes=MAX_LINE_BYTES), 0
    try:
        for piece in pieces(rng, data):
            reader.feed(piece)
            while (message := reader.next_message()) is not NEED_DATA:
                assert isinstance(message, Greeting) == (heard == 0)
                assert isinstance(message, Greeting | Reply | ErrorReply | Event)
                heard += 1
        reader.feed_eof()
    except QmpProtocolError as error:
        if not says_again(reader.next_message, error):
            raise AssertionError("a monitor that was refused goes on") from error
        return f"QMP: refused{' behind the greeting' if heard else ''}"
    return "QMP: read"


def _hmp(rng: random.Random) -> str:
    """Texts of the human monitor, which come inside of replies."""
    address = number(rng) % 2**48
    row = f"{address:016x}: 0x{number(rng) % 2**64:016x} 0x0000000000000001\r\n"
    told = f"Host virtual address for {address:#x} (pc.ram) is {number(rng) % 2**64:#x}\n"
    text = rng.choice((row, told))
    if rng.random() < 0.7:
        text = damage(rng, text.encode(), row.encode(), head=60).decode("latin1")
    refused = 0
    for parse in (
        lambda: parse_memory(text, address, rng.choice((1, 8, 16))),
        lambda: parse_host_address(text, address),
    ):
        try:
            parse()
        except QmpProtocolError:
            refused += 1
    return "HMP: refused" if refused == 2 else "HMP: read"


# --- codecs -----------------------------------------------------------------------------------


def codecs() -> Case:
    """Compressed pages: they fill exactly the memory they may, or ``CodecError``."""
    chance = random.Random(1)
    raws = [bytes(PAGE_SIZE), chance.randbytes(64) * 64, bytes(range(256)) * 48]
    raws += [b"".join(chance.choice((bytes(64), chance.randbytes(64))) for _ in range(256))]
    known: list[tuple[int, bytes, int]] = []
    for raw in raws:
        for codec, level in (
            (CodecId.LZ4, 1),
            (CodecId.ZSTD, 1),
            (CodecId.ZSTD, 19),
            (CodecId.WORDS, 1),
        ):
            encoded = make_codec(codec, level).encode(raw)
            assert encoded is not None
            known.append((codec, encoded, len(raw)))

    def case(rng: random.Random) -> str:
        codec, encoded, length = rng.choice(known)
        other = rng.choice(known)[1]
        if rng.random() < 0.9:
            encoded = damage(rng, encoded, other, head=rng.choice((16, 400)))
        if rng.random() < 0.1:
            length = max(0, rng.choice((length - 1, length + 1, number(rng) % 2**20)))
        codec = codec if rng.random() < 0.95 else rng.randrange(6)
        try:
            decode_into(codec, encoded, memoryview(bytearray(length)))
        except CodecError:
            return "codec: refused"
        return "codec: decoded"

    return case


# --- machine facts ----------------------------------------------------------------------------


def facts() -> Case:
    """What a peer says of its machine, and the comparison with ours."""
    ours = MachineFacts(
        qemu_version=(7, 2, 22),
        machine_type="pc-q35-7.2",
        vcpus=2,
        max_vcpus=4,
        cpu=CpuFacts("EPYC-x86_64-cpu", "AuthenticAMD 23/1/2", {"1.ECX": 9}, {"7.0.EBX": 1}),
        ram_bytes=2**29,
        ram_blocks=(
            RamBlockInfo("pc.ram", 2**29, 2**29),
            RamBlockInfo("pc.bios", 2**18, 2**18),
        ),
        devices=(
            Device("0000:00:00.0", "", "8086:29c0"),
            Device("0000:00:03.0:00.0", "virtio-blk-pci", ""),
        ),
        uuid="12345678-1234-1234-1234-123456789abc",
        run_state="running",
        accelerator="tcg",
        balloon=BalloonFacts(hint_offered=True, hinting=False),
        restore_balloon_bytes=2**28,
    )

    def case(rng: random.Random) -> str:
        said = ours.to_dict()
        for _ in range(rng.choice((1, 1, 2, 4))):
            said = changed(rng, said)
        try:
            theirs = MachineFacts.from_dict(said)
        except MessageError:
            return "facts: refused"
        differences = compare(ours, theirs) + compare(theirs, ours)
        assert all(len(item.text) < 100_000 for item in differences)
        return "facts: compared"

    return case
