"""Compare source and destination machine before anything is sent.

QEMU itself notices few differences, and late: another ``-cpu`` or one more device on the
destination loads without a word, and the guest breaks afterwards. ``collect_facts`` asks a QEMU
over QMP, in whatever state it is; ``compare`` is pure.

What QMP does not tell is not compared: ``NOT_COMPARED``.
"""

import enum
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from migrate.errors import GuestError, QmpCommandError
from migrate.qemu import queries
from migrate.qemu.balloon import find_balloon
from migrate.qemu.machine_facts import BalloonFacts, CpuFacts, Device, MachineFacts
from migrate.qemu.qmp_client import QmpClient
from migrate.qemu.queries import RamBlockInfo
from proto.qemu.qmp import JsonValue

NOT_COMPARED: Final = (
    "device properties such as queue counts and offloads",
    "contents of disks and firmware",
    "networks that the devices are plugged into",
)
"""What can differ between the machines without ``compare`` seeing it, for the report."""

_RESIZABLE_PREFIX: Final = "/rom@"
"""RAM blocks of generated tables: QEMU resizes them on load. All other blocks, ROMs included,
fail with "Size mismatch" (tried with vga.rom and pc.bios on 7.2 and 10.0)."""

_DERIVED_LEAF: Final = "d."
"""CPUID leaf 0xd follows from the other leaves, and by different rules: 7.2 offers AVX-512 save
areas for ``-cpu Icelake-Server`` under TCG, 10.0 does not, both without AVX-512."""

_IGNORED_FEATURES: Final[Mapping[str, int]] = {
    "1.EDX": 1 << 28,  # ht
    "80000001.ECX": 1 << 1,  # cmp-legacy
    "7.0.EBX": 1 << 22,  # pcommit
}
"""Bits that tell nothing. The first two follow from the number of vCPUs: 10.0 stores them in
the words, 7.2 adds them when the guest asks. The last is an instruction that was withdrawn
before any processor had it: ``-cpu max`` of 7.2 offers it, 10.0 knows it no more."""

_ADDRESS_PROPERTIES: Final = (
    "nr", "port", "unit", "channel", "scsi-id", "lun", "iobase", "slot", "socket-id", "core-id",
)  # fmt: skip
"""Properties that tell apart devices on one bus that is not PCI."""

_FEATURE_NAMES: Final[Mapping[str, Mapping[int, str]]] = {
    "1.ECX": {0: "sse3", 1: "pclmulqdq", 9: "ssse3", 12: "fma", 13: "cx16", 17: "pcid",
              19: "sse4.1", 20: "sse4.2", 21: "x2apic", 22: "movbe", 23: "popcnt", 25: "aes",
              26: "xsave", 28: "avx", 29: "f16c", 30: "rdrand", 31: "hypervisor"},
    "1.EDX": {4: "tsc", 6: "pae", 9: "apic", 15: "cmov", 23: "mmx", 24: "fxsr", 25: "sse",
              26: "sse2", 27: "ss"},
    "7.0.EBX": {0: "fsgsbase", 3: "bmi1", 5: "avx2", 7: "smep", 8: "bmi2", 9: "erms",
                10: "invpcid", 16: "avx512f", 18: "rdseed", 19: "adx", 20: "smap",
                23: "clflushopt", 24: "clwb", 29: "sha-ni"},
    "80000001.ECX": {0: "lahf-lm", 2: "svm", 5: "abm", 6: "sse4a", 8: "3dnowprefetch"},
    "80000001.EDX": {11: "syscall", 20: "nx", 26: "pdpe1gb", 27: "rdtscp", 29: "lm"},
}  # fmt: skip
"""Names for the bits an operator is most likely to meet; the others are printed by number."""


class Severity(enum.Enum):
    """What a difference means for the migration."""

    ERROR = "error"
    """The guest would be damaged, or QEMU would refuse the load."""
    WARNING = "warning"
    """It works as far as is known, but the operator should know."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference: how bad, and a text that names what, source and destination."""

    severity: Severity
    text: str


async def collect_facts(client: QmpClient) -> MachineFacts:
    """Ask a QEMU for its machine; works also while it waits with ``-incoming defer``.

    Raises:
        GuestError: It answered something unexpected.
        QmpInterruptedError: It exited.
    """
    vcpu_paths = await queries.query_vcpu_paths(client)
    if not vcpu_paths:
        raise GuestError("QEMU has no vCPU")
    machine_type = str(await queries.qom_get(client, "/machine", "type"))
    version = await queries.query_version(client)
    return MachineFacts(
        qemu_version=version.number,
        machine_type=machine_type.removesuffix("-machine"),
        vcpus=len(vcpu_paths),
        max_vcpus=await queries.query_max_vcpus(client),
        cpu=await _collect_cpu(client, vcpu_paths[0]),
        ram_bytes=await queries.query_ram_bytes(client),
        ram_blocks=await queries.query_ram_blocks(client),
        devices=await _collect_devices(client),
        uuid=await queries.query_uuid(client),
        run_state=(await queries.query_run_state(client)).status,
        accelerator=await queries.query_accelerator(client),
        balloon=await _collect_balloon(client),
    )


async def _collect_balloon(client: QmpClient) -> BalloonFacts | None:
    device = await find_balloon(client)
    return None if device is None else BalloonFacts(device.hint_offered, device.hinting)


async def _collect_cpu(client: QmpClient, path: str) -> CpuFacts:
    names = ("vendor", "family", "model", "stepping")
    signature = [str(await queries.qom_get(client, path, name)) for name in names]
    return CpuFacts(
        qom_type=str(await queries.qom_get(client, path, "type")),
        signature=f"{signature[0]} {'/'.join(signature[1:])}",
        words=await queries.query_cpu_words(client, path, "feature-words"),
        filtered=await queries.query_cpu_words(client, path, "filtered-features"),
    )


@dataclass(frozen=True, slots=True)
class _UserDevice:
    qom_type: str
    bus: str
    devfn: int | None
    address: str


async def _collect_devices(client: QmpClient) -> tuple[Device, ...]:
    created: dict[str, _UserDevice] = {}
    for container in ("/machine/peripheral", "/machine/peripheral-anon"):
        for name, kind in (await queries.qom_children(client, container)).items():
            if kind.startswith("child<"):
                path = f"{container}/{name}"
                created[path] = await _collect_user_device(client, path, kind[6:-1])
    types = {_place(created, path): device.qom_type for path, device in created.items()}
    devices = []
    for function in await queries.query_pci_root_devices(client):
        place = f"0000:{function.bus:02x}:{function.slot:02x}.{function.function:x}"
        ids = f"{function.vendor:04x}:{function.device:04x}"
        devices.append(Device(place, types.get(place, ""), ids))
    listed = {device.place for device in devices}
    for path, device in created.items():
        if (place := _place(created, path)) not in listed:
            devices.append(Device(place, device.qom_type, ""))
    return tuple(sorted(devices, key=lambda device: (device.place, device.qom_type)))


async def _collect_user_device(client: QmpClient, path: str, qom_type: str) -> _UserDevice:
    properties = await queries.qom_children(client, path)
    bus = await _property(client, path, "parent_bus") if "parent_bus" in properties else ""
    devfn = None
    address = ""
    if "multifunction" in properties:  # a PCI device; other kinds have an 'addr' too
        devfn = await _property(client, path, "addr")
    else:
        names = [name for name in _ADDRESS_PROPERTIES if name in properties]
        address = ",".join([f"{name}={await _property(client, path, name)}" for name in names])
    return _UserDevice(qom_type, str(bus or ""), devfn, address)


async def _property(client: QmpClient, path: str, name: str) -> JsonValue:
    try:
        return await queries.qom_get(client, path, name)
    except QmpCommandError:
        return None  # not readable


def _place(created: Mapping[str, _UserDevice], path: str) -> str:
    """Where a created device is, in words that neither ids nor creation order change."""
    device = created[path]
    owner = next((other for other in created if device.bus.startswith(f"{other}/")), None)
    name = device.bus.rpartition("/")[2]
    if device.devfn is not None:
        if owner is None:
            bus = "0000:00" if name in {"pcie.0", "pci.0"} else name
        else:
            bus = _place(created, owner)
        return f"{bus}:{device.devfn >> 3:02x}.{device.devfn & 7:x}"
    if owner is not None:
        # The bus is named after its owner's id; only its number says which of several it is.
        number = name.rpartition(".")[2]
        name = _place(created, owner) + (f".{number}" if number.isdigit() else "")
    return f"{name or 'machine'}/{device.address}"


def compare(source: MachineFacts, destination: MachineFacts) -> list[Difference]:
    """List what differs between two machines, errors first.

    Pure: neither machine is asked anything. Nothing is said of what may differ, so the same
    command line on QEMU 7.2 and 10.0 with one machine type gives an empty list.
    """
    found = [
        *_compare_states(source, destination),
        *_compare_values(source, destination),
        *_compare_cpus(source.cpu, destination.cpu),
        *_compare_ram_blocks(source.ram_blocks, destination.ram_blocks),
        *_compare_devices(source.devices, destination.devices),
        *_compare_balloons(source.balloon, destination.balloon),
    ]
    return sorted(found, key=lambda difference: difference.severity is not Severity.ERROR)


def compare_with_before(before: MachineFacts, now: MachineFacts) -> list[str]:
    """List what of one machine is not what it was, in words.

    Nothing is said of what changes by itself: run state, balloon, what virtio-mem has plugged, and
    RAM blocks that QEMU resizes.
    """
    values = (
        ("machine type", before.machine_type, now.machine_type),
        ("vCPUs", before.vcpus, now.vcpus),
    )
    found = [f"{what}: before {old}, now {new}" for what, old, new in values if old != new]
    if before.cpu != now.cpu:
        found.append("CPU: another model, or other features")
    blocks = [
        {block.idstr: block.used_bytes for block in facts.ram_blocks if not _resizes(block)}
        for facts in (before, now)
    ]
    old_blocks, new_blocks = blocks
    for verb, one, other in (
        ("gone", old_blocks, new_blocks),
        ("new", new_blocks, old_blocks),
    ):
        found += [f"RAM block {verb}: {idstr}" for idstr in sorted(one.keys() - other.keys())]
    for idstr in sorted(old_blocks.keys() & new_blocks.keys()):
        if (old := old_blocks[idstr]) != (new := new_blocks[idstr]):
            found.append(f"length of RAM block {idstr}: before {old} bytes, now {new} bytes")
    had, has = Counter(before.devices), Counter(now.devices)
    for verb, devices in (("gone", had - has), ("new", has - had)):
        found += [f"device {verb}: {_label(device)}" for device in devices.elements()]
    return found


def _resizes(block: RamBlockInfo) -> bool:
    return block.idstr.startswith(_RESIZABLE_PREFIX)


def _differs(severity: Severity, what: str, source: object, destination: object) -> Difference:
    return Difference(severity, f"{what}: source {source}, destination {destination}")


def _compare_states(source: MachineFacts, destination: MachineFacts) -> Iterator[Difference]:
    if destination.run_state != queries.RUN_STATE_INCOMING:
        text = (
            f"destination QEMU does not wait for a migration: it is '{destination.run_state}'"
        )
        yield Difference(Severity.ERROR, text)
    if source.run_state in {queries.RUN_STATE_INCOMING, queries.RUN_STATE_COMPLETED_SOURCE}:
        text = f"source QEMU has no guest to migrate: it is '{source.run_state}'"
        yield Difference(Severity.ERROR, text)


def _compare_values(source: MachineFacts, destination: MachineFacts) -> Iterator[Difference]:
    for what, ours, theirs in (
        ("machine type", source.machine_type, destination.machine_type),
        ("vCPUs", source.vcpus, destination.vcpus),
        ("maximal vCPUs", source.max_vcpus, destination.max_vcpus),
        ("RAM", f"{source.ram_bytes} bytes", f"{destination.ram_bytes} bytes"),
    ):
        if ours != theirs:
            yield _differs(Severity.ERROR, what, ours, theirs)
    if source.uuid != destination.uuid:
        both = source.uuid is not None and destination.uuid is not None
        severity = Severity.ERROR if both else Severity.WARNING
        yield _differs(severity, "VM UUID", source.uuid or "none", destination.uuid or "none")
    if source.accelerator != destination.accelerator:
        # KVM sends a section (kvmclock) that TCG does not know.
        severity = Severity.ERROR if source.accelerator == "kvm" else Severity.WARNING
        yield _differs(severity, "accelerator", source.accelerator, destination.accelerator)
    if source.qemu_version > destination.qemu_version:
        versions = [
            ".".join(map(str, v)) for v in (source.qemu_version, destination.qemu_version)
        ]
        yield _differs(Severity.WARNING, "QEMU is older on the destination", *versions)


def _compare_cpus(source: CpuFacts, destination: CpuFacts) -> Iterator[Difference]:
    """Compare what the guest sees, not what was asked for.

    A feature the destination lacks may be in use. One it has in addition is a warning, unless
    the source's command line asked for it in vain: then both have the same ``-cpu``, and only
    the destination's QEMU or host is newer.
    """
    if source.qom_type != destination.qom_type:
        yield _differs(
            Severity.ERROR, "CPU model", _model(source.qom_type), _model(destination.qom_type)
        )
        return
    lost = list(_features(source.words, destination.words))
    if lost:
        text = f"CPU features missing on the destination: {', '.join(lost)}"
        yield Difference(Severity.ERROR, text)
    expected = {
        register: source.words.get(register, 0) | source.filtered.get(register, 0)
        for register in source.words.keys() | source.filtered.keys()
    }
    gained = list(_features(destination.words, expected))
    if gained:
        text = f"CPU features only on the destination: {', '.join(gained)}"
        yield Difference(Severity.WARNING, text)
    if source.signature != destination.signature:
        yield _differs(
            Severity.WARNING, "CPU signature", source.signature, destination.signature
        )


def _model(qom_type: str) -> str:
    return qom_type.removesuffix("-x86_64-cpu")


def _features(words: Mapping[str, int], without: Mapping[str, int]) -> Iterator[str]:
    for register, bits in sorted(words.items()):
        if register.startswith(_DERIVED_LEAF):
            continue
        rest = bits & ~without.get(register, 0) & ~_IGNORED_FEATURES.get(register, 0)
        for bit in range(rest.bit_length()):
            if rest >> bit & 1:
                name = _FEATURE_NAMES.get(register, {}).get(bit)
                yield name or f"CPUID {register} bit {bit}"


def _compare_ram_blocks(
    source: tuple[RamBlockInfo, ...], destination: tuple[RamBlockInfo, ...]
) -> Iterator[Difference]:
    theirs = {block.idstr: block for block in destination}
    for block in source:
        other = theirs.pop(block.idstr, None)
        if other is None:
            text = f"RAM block only on the source: {block.idstr} ({block.used_bytes} bytes)"
            yield Difference(Severity.ERROR, text)
        elif not _fits(block, other):
            yield _differs(
                Severity.ERROR,
                f"length of RAM block {block.idstr}",
                f"{block.used_bytes} bytes",
                f"{other.used_bytes} bytes",
            )
    for block in theirs.values():
        # QEMU loads without it; the device it belongs to is compared elsewhere.
        text = f"RAM block only on the destination: {block.idstr} ({block.used_bytes} bytes)"
        yield Difference(Severity.WARNING, text)


def _fits(source: RamBlockInfo, destination: RamBlockInfo) -> bool:
    if source.used_bytes == destination.used_bytes:
        return True
    return _resizes(destination) and source.used_bytes <= destination.total_bytes


def _compare_balloons(
    source: BalloonFacts | None, destination: BalloonFacts | None
) -> Iterator[Difference]:
    """QEMU compares features too, but only when it loads the device at the very end."""
    if source is None or destination is None:
        return
    if source.hinting and not destination.hint_offered:
        text = (
            "the guest uses free-page hinting, and the destination's balloon device lacks it: "
            "give it free-page-hint=on and an iothread as at the source"
        )
        yield Difference(Severity.ERROR, text)


def _compare_devices(
    source: tuple[Device, ...], destination: tuple[Device, ...]
) -> Iterator[Difference]:
    places: dict[str, tuple[list[Device], list[Device]]] = defaultdict(lambda: ([], []))
    for side, devices in enumerate((source, destination)):
        for device in devices:
            places[device.place][side].append(device)
    for place, (here, there) in sorted(places.items()):
        ours = list((Counter(here) - Counter(there)).elements())
        theirs = list((Counter(there) - Counter(here)).elements())
        for one, other in zip(ours, theirs, strict=False):
            yield _differs(Severity.ERROR, f"device at {place}", one, other)
        for device in ours[len(theirs) :]:
            text = f"device only on the source: {_label(device)}"
            yield Difference(Severity.ERROR, text)
        for device in theirs[len(ours) :]:
            text = f"device only on the destination: {_label(device)}"
            yield Difference(Severity.ERROR, text)


def _label(device: Device) -> str:
    return f"{device.qom_type or device} at {device.place}"
