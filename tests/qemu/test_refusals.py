"""A fault anywhere between the two guests' RAM is refused before the handover."""

import sys
from pathlib import Path

import pytest

from tests.qemu.commands import Bench

pytestmark = pytest.mark.qemu

FAULTY = Path(__file__).with_name("faulty.py")


@pytest.mark.parametrize(
    ("fault", "command", "options", "said"),
    [
        (
            "flip_after_decoding",
            "migrate-dst",
            ["--landing", "never"],
            r"page \d+ of block pc.ram",
        ),
        ("flip_while_landing", "migrate-dst", [], r"page \d+ of block pc.ram"),
        ("read_wrong_slot", "migrate-dst", ["--landing", "never"], r"page \d+ of block \S+"),
        ("lose_delta", "migrate-dst", ["--landing", "never"], r"page \d+ of block pc.ram"),
        ("lose_delta", "migrate-dst", [], r"page \d+ of block pc.ram"),
        ("use_wrong_base", "migrate-dst", ["--landing", "never"], r"page \d+ of block pc.ram"),
        ("use_wrong_base", "migrate-dst", [], r"page \d+ of block pc.ram"),
        ("drop_batch", "migrate-dst", [], r"page \d+ of block pc.ram"),
        (
            "flip_device_state",
            "migrate-dst",
            ["--compress", "none"],
            "the device state differs",
        ),
        ("lose_frame", "migrate-src", [], "sequence number"),
    ],
)
async def test_fault_is_refused_before_the_handover(
    short_tmp: Path, fault: str, command: str, options: list[str], said: str
) -> None:
    noise = {"noise_mib": 4, "hot_pages": 32}
    async with Bench.open(short_tmp) as bench:
        bench.programs[command] = [sys.executable, str(FAULTY), fault, command]
        source = await bench.source(**noise)
        of_source = command == "migrate-src" or "--compress" in options
        dst = await bench.destination(
            *([] if of_source else options), qemu=bench.qemu_command(**noise)
        )
        src = await bench.start_source(source, dst.port, *(options if of_source else []))
        await src.wait_line(said)
        assert await src.wait() != 0
        assert await dst.wait() != 0
        assert src.guest_on == "source"
        assert src.report["integrity"]["equal"] is not True
        assert await source.runs()
        assert await bench.left_behind(src, dst) == []
