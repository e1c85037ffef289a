"""The recorded streams of ``tests/golden``; only ``tools/record-stream`` writes them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import zstandard  # noqa: TID251  the link's codec takes frames of up to 1 MiB, these are longer

GOLDEN: Final = Path(__file__).parent / "golden"
MULTIFD: Final = GOLDEN / "multifd"
"""Migrations over several connections, each recorded one behind the other in one file."""
MAX_BYTES: Final = 16 * 2**20


@dataclass(frozen=True, slots=True)
class GoldenInfo:
    """The ``.json`` beside a recorded stream.

    Attributes:
        qemu: Version of the QEMU that wrote it.
        machine: Machine type.
        command: QEMU's command line; ``bios.bin`` is the firmware of ``tests/stream_capture.py``.
        capabilities: Migration capabilities that were on.
        size_bytes: Length of the stream.
        sha256: Of the stream.
        connection_bytes: Lengths of the connections in it, the main one first; empty for one.
    """

    qemu: str
    machine: str
    command: str
    capabilities: tuple[str, ...]
    size_bytes: int
    sha256: str
    connection_bytes: tuple[int, ...] = ()


def names(folder: Path = GOLDEN) -> list[str]:
    """Names of all recorded streams, e.g. ``7.2-plain``."""
    return sorted(path.name.removesuffix(".bin.zst") for path in folder.glob("*.bin.zst"))


def info(name: str, folder: Path = GOLDEN) -> GoldenInfo:
    """What is known of a stream."""
    fields = json.loads((folder / f"{name}.json").read_text())
    fields["capabilities"] = tuple(fields["capabilities"])
    fields["connection_bytes"] = tuple(fields.get("connection_bytes", ()))
    return GoldenInfo(**fields)


def load(name: str, folder: Path = GOLDEN) -> bytes:
    """A stream's bytes, checked against its sum."""
    packed = (folder / f"{name}.bin.zst").read_bytes()
    data = zstandard.ZstdDecompressor().decompress(packed, max_output_size=MAX_BYTES)
    assert hashlib.sha256(data).hexdigest() == info(name, folder).sha256, f"{name} was changed"
    return data


def load_connections(name: str) -> list[bytes]:
    """A multifd migration, connection by connection, the main one first."""
    data, at = load(name, MULTIFD), 0
    connections = []
    for length in info(name, MULTIFD).connection_bytes:
        connections.append(data[at : at + length])
        at += length
    return connections


def save(name: str, data: bytes, about: GoldenInfo, folder: Path = GOLDEN) -> int:
    """Write a stream and its description; returns the packed size in bytes."""
    packed = zstandard.ZstdCompressor(level=19).compress(data)
    (folder / f"{name}.bin.zst").write_bytes(packed)
    fields = asdict(about)
    if not about.connection_bytes:
        del fields["connection_bytes"]
    text = json.dumps(fields, indent=1)
    (folder / f"{name}.json").write_text(f"{text}\n")
    return len(packed)
