"""A fault anywhere between the two guests' RAM is refused before the handover."""

import sys
from pathlib import Path

import pytest

from tests.qemu.commands import Bench

pytestmark = pytest.mark.qemu

FAULTY = Path(__file__).with_name("faulty.py")


THROUGH_STREAM = ["--landing", "never"]
PAGE = r"page \d+ of block pc.ram"

KEEPS_ALL = ["--compress", "lz4", "--max-bandwidth", "200Mbit"]
"""Left to itself the engine may keep no page here that is sent for the first time. The rate gives
the guest, which ticks 18 times a second, time to write to its hot pages before it is stopped."""


@pytest.mark.parametrize(
    ("fault", "at_destination", "at_source", "said"),
    [
        ("flip_after_decoding", THROUGH_STREAM, [], PAGE),
        ("flip_while_landing", [], [], PAGE),
        ("read_wrong_slot", THROUGH_STREAM, KEEPS_ALL, r"page \d+ of block \S+"),
        ("lose_delta", THROUGH_STREAM, KEEPS_ALL, PAGE),
        ("lose_delta", [], KEEPS_ALL, PAGE),
        ("use_wrong_base", THROUGH_STREAM, KEEPS_ALL, PAGE),
        ("use_wrong_base", [], KEEPS_ALL, PAGE),
        ("drop_batch", [], [], PAGE),
        ("flip_device_state", [], ["--compress", "none"], "the device state differs"),
        ("lose_frame", [], [], "sequence number"),
    ],
)
async def test_fault_is_refused_before_the_handover(
    short_tmp: Path, fault: str, at_destination: list[str], at_source: list[str], said: str
) -> None:
    command = "migrate-src" if fault == "lose_frame" else "migrate-dst"
    noise = {"noise_mib": 12 if at_source is KEEPS_ALL else 4, "hot_pages": 32}
    async with Bench.open(short_tmp) as bench:
        bench.programs[command] = [sys.executable, str(FAULTY), fault, command]
        source = await bench.source(**noise)
        dst = await bench.destination(*at_destination, qemu=bench.qemu_command(**noise))
        src = await bench.start_source(source, dst.port, *at_source)
        await src.wait_line(said)
        assert await src.wait() != 0
        assert await dst.wait() != 0
        assert src.guest_on == "source"
        assert src.report["integrity"]["equal"] is not True
        assert await source.runs()
        assert await bench.left_behind(src, dst) == []
