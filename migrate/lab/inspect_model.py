"""What ``migrate-lab inspect`` knows of a stream: plain data, filled while the stream is read.

Offsets count from the first byte of the (unpacked) stream. Everything that was read before an
error stays, so a damaged stream shows what was good in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from proto.qemu.vmdesc import DeviceSlice

PAGE_KINDS: Final = ("page", "zero", "xbzrle", "compressed")

Phase = Literal["precopy", "stop-and-copy", "postcopy"]


@dataclass(slots=True)
class KindCounts:
    """One number for each kind of page record.

    Attributes:
        page: Records with the whole content.
        zero: Records that say a page is zero.
        xbzrle: Records with a difference to the page's earlier content.
        compressed: Records with a zlib-compressed page (QEMU 7.2).
    """

    page: int = 0
    zero: int = 0
    xbzrle: int = 0
    compressed: int = 0

    def add(self, kind: str, count: int) -> None:
        """Add to one kind, one of ``PAGE_KINDS``."""
        setattr(self, kind, getattr(self, kind) + count)

    def items(self) -> Iterator[tuple[str, int]]:
        """Yield kinds and numbers."""
        return ((kind, getattr(self, kind)) for kind in PAGE_KINDS)

    def total(self) -> int:
        """Return the sum of all kinds."""
        return sum(number for _, number in self.items())


@dataclass(slots=True)
class Damage:
    """Where and why a stream could not be read further.

    Attributes:
        offset_bytes: First byte that is not good, or that is missing.
        section: Part of the stream it lies in.
        expected: What QEMU would have written there.
        got: What is there.
    """

    offset_bytes: int
    section: str
    expected: str
    got: str

    def text(self) -> str:
        """Return one line."""
        return f"byte {self.offset_bytes}, {self.section}: expected {self.expected}, got {self.got}"


@dataclass(slots=True)
class Configuration:
    """The header.

    Attributes:
        stream_version: Of the format; always 3.
        machine: Machine type, e.g. ``pc-q35-7.2``.
        subsections: Names of the configuration's subsections.
        capabilities: Migration capabilities that change the format.
        uuid: The machine's UUID where the source lets it be checked.
        target_page_bits: Where the source says them.
    """

    stream_version: int
    machine: str
    subsections: list[str] = field(default_factory=list)
    capabilities: list[str] = field(default_factory=list)
    uuid: str | None = None
    target_page_bits: int | None = None


@dataclass(slots=True)
class Block:
    """One RAM block and how often its pages came.

    Attributes:
        name: QEMU's name, e.g. ``pc.ram``.
        size_bytes: Bytes in use.
        gpa: Guest physical address, where the stream says it (x-ignore-shared).
        records: Page records of all rounds.
    """

    name: str
    size_bytes: int
    gpa: int | None = None
    records: KindCounts = field(default_factory=KindCounts)


@dataclass(slots=True)
class Round:
    """One walk over RAM, or all that came while the guest stood still.

    Attributes:
        n: 0 = bulk.
        phase: ``stop-and-copy`` is one round whatever walks it has.
        start_offset_bytes: Of its first byte.
        end_offset_bytes: Behind its last byte; the next round starts there.
        pages: Page records.
        page_bytes: Bytes of these records; the rest of the round is section headers, end marks,
            commands and other sections.
        start_ms: When it began to arrive, since the first byte; ``None`` for a file.
        end_ms: When it had arrived.
    """

    n: int
    phase: Phase
    start_offset_bytes: int
    end_offset_bytes: int
    pages: KindCounts = field(default_factory=KindCounts)
    page_bytes: KindCounts = field(default_factory=KindCounts)
    start_ms: float | None = None
    end_ms: float | None = None

    @property
    def stream_bytes(self) -> int:
        """Bytes of the stream from its start to its end."""
        return self.end_offset_bytes - self.start_offset_bytes


@dataclass(slots=True)
class Command:
    """One command between sections.

    Attributes:
        offset_bytes: Of its first byte.
        number: QEMU's number.
        name: QEMU's name without ``MIG_CMD_``.
        value: What it carries, in words; empty if nothing.
        size_bytes: All of it.
    """

    offset_bytes: int
    number: int
    name: str
    value: str
    size_bytes: int


@dataclass(slots=True)
class Section:
    """One section: iterable (START, any number of PARTs, END) or device (FULL).

    Attributes:
        section_id: The stream's number for it.
        name: Its idstr.
        instance: Instance of that name.
        version: Of its format.
        kind: ``iterable`` or ``device``.
        offset_bytes: Of its first byte.
        stream_bytes: All its bytes, headers and footers included.
        body_bytes: The state itself; ``None`` for an iterable.
        parts: Number of PARTs.
        ended: Whether its END came; ``True`` for a device.
        detail: What is known of it beyond that, in words.
    """

    section_id: int
    name: str
    instance: int
    version: int
    kind: Literal["iterable", "device"]
    offset_bytes: int
    stream_bytes: int = 0
    body_bytes: int | None = None
    parts: int = 0
    ended: bool = False
    detail: str = ""


@dataclass(slots=True)
class Survey:
    """All that was found in one stream.

    Attributes:
        configuration: ``None`` if the header is damaged.
        blocks: RAM blocks in the stream's order.
        rounds: In order.
        commands: In order.
        sections: In order of their first byte.
        device_state_offset_bytes: Where the device state begins; ``None`` if it was not reached.
        virtio: The virtio devices' state.
        description_bytes: Size of the description (VMDESCRIPTION); ``None`` if there is none.
        run_state: The guest's run state when it was stopped.
        stream_bytes: Bytes read as part of the stream.
        trailing_bytes: Bytes behind the end of the stream.
        not_shown: What the stream holds and cannot be shown, in words.
        complete: Whether the end of the stream was reached.
        damage: Why not.
    """

    configuration: Configuration | None = None
    blocks: list[Block] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    device_state_offset_bytes: int | None = None
    virtio: list[DeviceSlice] = field(default_factory=list)
    description_bytes: int | None = None
    run_state: str | None = None
    stream_bytes: int = 0
    trailing_bytes: int = 0
    not_shown: list[str] = field(default_factory=list)
    complete: bool = False
    damage: Damage | None = None

    @property
    def ram_bytes(self) -> int:
        """Guest RAM, all blocks."""
        return sum(block.size_bytes for block in self.blocks)

    def pages(self) -> KindCounts:
        """Return the page records of all rounds."""
        total = KindCounts()
        for this_round in self.rounds:
            for kind, count in this_round.pages.items():
                total.add(kind, count)
        return total

    def devices(self) -> list[Section]:
        """Return the FULL sections."""
        return [section for section in self.sections if section.kind == "device"]

    def cannot_show(self, text: str) -> None:
        """Add to ``not_shown``, once."""
        if text not in self.not_shown:
            self.not_shown.append(text)
