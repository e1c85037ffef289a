"""What a QEMU says of its machine, as plain data that travels to the other command.

The peer's facts are untrusted: they are checked when they are read, and texts that an operator
will see on a terminal must be printable.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from migrate.qemu.queries import RamBlockInfo
from proto.errors import MessageError

MAX_ITEMS: Final = 4096
"""Most devices, RAM blocks or CPUID words; PCI alone could have more, no machine does."""

MAX_TEXT_CHARS: Final = 512
"""Longest text; RAM block names have at most 255 bytes."""

MAX_INTEGER: Final = 2**64 - 1

RESTORE_BALLOON: Final = "restore_balloon_bytes"
"""Key of what a guest that was ballooned for its migration had before."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """The first vCPU; all have the same model.

    Attributes:
        qom_type: QEMU's type, e.g. ``qemu64-x86_64-cpu``.
        signature: Vendor, family, model and stepping that the guest reads.
        words: CPUID feature words the guest sees, by register (``7.0.EBX``), without zero ones.
        filtered: Features that the command line asked for and this host or QEMU cannot give.
    """

    qom_type: str
    signature: str
    words: Mapping[str, int]
    filtered: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class BalloonFacts:
    """The balloon device.

    Attributes:
        hint_offered: It has ``free-page-hint=on``.
        hinting: The guest's driver uses it.
    """

    hint_offered: bool
    hinting: bool


@dataclass(frozen=True, slots=True)
class Device:
    """A device of the machine.

    Attributes:
        place: Where it is plugged: a PCI path as in QEMU's section names (``0000:00:03.0``,
            behind a bridge ``0000:00:03.0:00.0``), or bus and address of another kind.
        qom_type: QEMU's type; empty for a built-in device, whose type QMP does not tell.
        pci_ids: ``vendor:device`` in hexadecimal; empty if it is not on a PCI root bus.
    """

    place: str
    qom_type: str
    pci_ids: str

    def __str__(self) -> str:
        if self.qom_type and self.pci_ids:
            return f"{self.qom_type} ({self.pci_ids})"
        return self.qom_type or f"PCI device {self.pci_ids}"


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """A machine, as far as QMP tells and both versions tell it alike.

    Attributes:
        qemu_version: (major, minor, micro).
        machine_type: Full name, e.g. ``pc-q35-7.2``; never an alias.
        vcpus: CPUs present.
        max_vcpus: CPUs that could be plugged, those included.
        cpu: The first of them.
        ram_bytes: Guest memory, DIMMs included.
        ram_blocks: RAM blocks that migrate.
        devices: PCI devices on root buses, and every device the user created.
        uuid: The VM's UUID, ``None`` if it was given none.
        run_state: QEMU's word.
        accelerator: ``kvm`` or ``tcg``.
        balloon: The balloon; ``None`` if there is none, or it cannot be asked about.
        restore_balloon_bytes: Memory that the guest is to have again after its migration, for
            which it gave some of it back; ``None``: it gave nothing.
    """

    qemu_version: tuple[int, int, int]
    machine_type: str
    vcpus: int
    max_vcpus: int
    cpu: CpuFacts
    ram_bytes: int
    ram_blocks: tuple[RamBlockInfo, ...]
    devices: tuple[Device, ...]
    uuid: str | None
    run_state: str
    accelerator: str
    balloon: BalloonFacts | None = None
    restore_balloon_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON/msgpack types."""
        return {
            "qemu_version": list(self.qemu_version),
            "machine_type": self.machine_type,
            "vcpus": self.vcpus,
            "max_vcpus": self.max_vcpus,
            "cpu": {
                "qom_type": self.cpu.qom_type,
                "signature": self.cpu.signature,
                "words": dict(self.cpu.words),
                "filtered": dict(self.cpu.filtered),
            },
            "ram_bytes": self.ram_bytes,
            "ram_blocks": [
                [block.idstr, block.used_bytes, block.total_bytes] for block in self.ram_blocks
            ],
            "devices": [[item.place, item.qom_type, item.pci_ids] for item in self.devices],
            "uuid": self.uuid,
            "run_state": self.run_state,
            "accelerator": self.accelerator,
            "balloon": self.balloon and [self.balloon.hint_offered, self.balloon.hinting],
            RESTORE_BALLOON: self.restore_balloon_bytes,
        }

    @classmethod
    def from_dict(cls, value: object) -> "MachineFacts":
        """Read facts from a peer; keys it knows and we do not are ignored.

        Raises:
            MessageError: A fact is missing, of another type, or out of range.
        """
        fields = _object(value, "machine facts")
        cpu = _object(fields.get("cpu"), "cpu")
        version = _items(fields.get("qemu_version"), "qemu_version", _integer)
        if len(version) != 3:
            raise MessageError("qemu_version", "3 numbers", str(len(version)))
        uuid = fields.get("uuid")
        ram_bytes = _integer(fields.get("ram_bytes"), "ram_bytes")
        return cls(
            qemu_version=(version[0], version[1], version[2]),
            machine_type=_text(fields.get("machine_type"), "machine_type"),
            vcpus=_integer(fields.get("vcpus"), "vcpus"),
            max_vcpus=_integer(fields.get("max_vcpus"), "max_vcpus"),
            cpu=CpuFacts(
                qom_type=_text(cpu.get("qom_type"), "cpu.qom_type"),
                signature=_text(cpu.get("signature"), "cpu.signature"),
                words=_words(cpu.get("words"), "cpu.words"),
                filtered=_words(cpu.get("filtered"), "cpu.filtered"),
            ),
            ram_bytes=ram_bytes,
            ram_blocks=_items(fields.get("ram_blocks"), "ram_blocks", _ram_block),
            devices=_items(fields.get("devices"), "devices", _device),
            uuid=None if uuid is None else _text(uuid, "uuid"),
            run_state=_text(fields.get("run_state"), "run_state"),
            accelerator=_text(fields.get("accelerator"), "accelerator"),
            balloon=_balloon(fields.get("balloon")),
            restore_balloon_bytes=_restore_balloon(fields.get(RESTORE_BALLOON), ram_bytes),
        )


def _ram_block(value: object, where: str) -> RamBlockInfo:
    parts = _row(value, where)
    return RamBlockInfo(
        _text(parts[0], where), _integer(parts[1], where), _integer(parts[2], where)
    )


def _device(value: object, where: str) -> Device:
    parts = _row(value, where)
    return Device(_text(parts[0], where), _text(parts[1], where), _text(parts[2], where))


def _balloon(value: object) -> BalloonFacts | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or [type(item) for item in value] != [bool, bool]:
        raise MessageError("balloon", "2 truth values", repr(value)[:40])
    return BalloonFacts(*value)


def _restore_balloon(value: object, ram_bytes: int) -> int | None:
    if value is None:
        return None
    n_bytes = _integer(value, RESTORE_BALLOON)
    if not 0 < n_bytes <= ram_bytes:
        raise MessageError(RESTORE_BALLOON, f"1 to {ram_bytes}", str(n_bytes))
    return n_bytes


def _row(value: object, where: str) -> list[object]:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise MessageError(where, "3 values", type(value).__name__)
    return list(value)


def _items(value: object, where: str, read: Callable[[object, str], _T]) -> tuple[_T, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_ITEMS:
        raise MessageError(where, f"a list of at most {MAX_ITEMS}", type(value).__name__)
    return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))


def _words(value: object, where: str) -> dict[str, int]:
    words = _object(value, where)
    return {
        _text(name, where): _integer(bits, f"{where}.{name}") for name, bits in words.items()
    }


def _object(value: object, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict) or len(value) > MAX_ITEMS:
        raise MessageError(where, f"a map of at most {MAX_ITEMS}", type(value).__name__)
    return value


def _integer(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_INTEGER:
        raise MessageError(where, f"a number from 0 to {MAX_INTEGER}", repr(value)[:40])
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS or not value.isprintable():
        expected = f"a printable text of at most {MAX_TEXT_CHARS} characters"
        raise MessageError(where, expected, repr(value)[:40])
    return value
