import re
from pathlib import Path

import pytest

from proto import limits
from proto.codecs import CodecId, decode
from proto.link import messages as m
from proto.link.dispatch import FRAMES, encode_message
from proto.link.fields import FIELDS
from proto.link.frames import FrameType, encode_frame
from proto.link.messages import Message
from proto.link.pages import PageBatch
from tests.strategies import page_array

DOCUMENT = (Path(__file__).parents[2] / "docs" / "link-protocol.md").read_text()

DIFFERENCE = bytes.fromhex("28b52ffd60002f8d000038000070616765000200940ff0fa278005")

EXAMPLES: dict[str, tuple[int, Message]] = {
    "PAGES": (
        3,
        PageBatch(
            0,
            zero_pages=page_array([0, 1, 2, 9]),
            same_count=5,
            ref_pages=page_array([4]),
            ref_slots=page_array([7]),
            delta_pages=page_array([5, 6, 7]),
            delta_bases=page_array([20, 21, 2]),
            delta_codec_id=CodecId.ZSTD,
            delta_encoded=DIFFERENCE,
        ),
    ),
    "ACK": (0, m.Ack(3, 2)),
    "ABORT": (0, m.Abort("cancelled", "by the user", "source")),
    "RECOVER": (0, m.Recover(bytes(range(16)), b"", "COMMIT_SENT")),
    "RECOVERED": (0, m.Recovered("ABORTED", "source", None, "QEMU is dead")),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_documented_example_is_what_goes_over_the_wire(name: str) -> None:
    found = re.search(rf"```hex {name}\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    lines = [line.split("  ", 1)[1] for line in found[1].splitlines()]
    seq, message = EXAMPLES[name]
    frame = encode_frame(message.frame_type, seq, *encode_message(message))
    assert bytes.fromhex(" ".join(lines)) == b"".join(frame)


def test_the_documented_difference_is_four_bytes_of_the_first_page() -> None:
    assert decode(CodecId.ZSTD, DIFFERENCE, 3 * 4096) == b"page".rjust(104, b"\0").ljust(
        3 * 4096, b"\0"
    )


def test_the_documented_limits_are_those_of_the_code() -> None:
    rows = re.findall(r"\| (?:1 to )?(\d+) \| `([A-Z_]+)` \|", DOCUMENT)
    documented = {name: int(value) for value, name in rows}
    unwired = {"SCRATCH_BYTES", "NOT_CACHED", "DIGEST_BYTES", "MIGRATION_ID_BYTES"}
    own = {
        name: value
        for name, value in vars(limits).items()
        if (name.isupper() and name.endswith(("_BYTES", "_CACHED"))) or name.startswith("MAX_")
    }
    imported = {"MAX_RUN_PAGES", "MAX_ZERO_RUN_PAGES"}
    assert documented == {n: v for n, v in own.items() if n not in unwired | imported}


def test_the_documented_types_are_those_of_the_code() -> None:
    rows = re.findall(
        r"^\| (\d+) \| ([A-Z_]+) \| (\w+)(, numbered)? \|", DOCUMENT, re.MULTILINE
    )
    documented = {
        (int(number), name, who, bool(numbered)) for number, name, who, numbered in rows
    }
    both = {(True, True): "both", (True, False): "source", (False, True): "destination"}
    assert documented == {
        (
            number.value,
            number.name,
            both[FRAMES[number].from_source, FRAMES[number].from_destination],
            FRAMES[number].numbered,
        )
        for number in FrameType
    }


@pytest.mark.parametrize("number", [number for number, keys in FIELDS.items() if keys])
def test_every_key_of_a_message_is_documented(number: FrameType) -> None:
    assert re.search(rf"^#+ .*{number.name} \({number.value}\)", DOCUMENT, re.MULTILINE)
    for key in FIELDS[number]:
        assert f"`{key}`" in DOCUMENT
