"""Machine facts survive the wire, hostile ones are refused, and differences are told apart."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.qemu.machine_facts import (
    MAX_ITEMS,
    BalloonFacts,
    CpuFacts,
    Device,
    MachineFacts,
)
from migrate.qemu.preflight import Severity, compare, compare_with_before
from migrate.qemu.queries import RamBlockInfo
from proto.errors import MessageError

MIB = 1 << 20

SOURCE = MachineFacts(
    qemu_version=(7, 2, 22),
    machine_type="pc-q35-7.2",
    vcpus=2,
    max_vcpus=4,
    cpu=CpuFacts("EPYC-x86_64-cpu", "AuthenticAMD 23/1/2", {"1.ECX": 0b1001}, {"7.0.EBX": 1}),
    ram_bytes=512 * MIB,
    ram_blocks=(
        RamBlockInfo("pc.ram", 512 * MIB, 512 * MIB),
        RamBlockInfo("/rom@etc/acpi/tables", 0x20000, 0x200000),
        RamBlockInfo("pc.bios", 0x40000, 0x40000),
    ),
    devices=(
        Device("0000:00:00.0", "", "8086:29c0"),
        Device("0000:00:02.0", "virtio-net-pci", "1af4:1000"),
        Device("0000:00:03.0:00.0", "virtio-blk-pci", ""),
    ),
    uuid="12345678-1234-1234-1234-123456789abc",
    run_state="running",
    accelerator="tcg",
    balloon=BalloonFacts(hint_offered=True, hinting=False),
    restore_balloon_bytes=256 * MIB,
)
OPTIONAL = {"uuid", "balloon", "restore_balloon_bytes"}
"""Facts that a machine may lack."""

DESTINATION = replace(SOURCE, qemu_version=(10, 0, 2), run_state="inmigrate")


def found(source: MachineFacts, destination: MachineFacts) -> list[tuple[str, str]]:
    return [(item.severity.value, item.text) for item in compare(source, destination)]


def with_cpu(facts: MachineFacts, **changes: object) -> MachineFacts:
    return replace(facts, cpu=replace(facts.cpu, **changes))  # type: ignore[arg-type]


def with_block(facts: MachineFacts, idstr: str, used_bytes: int, total: int) -> MachineFacts:
    others = tuple(block for block in facts.ram_blocks if block.idstr != idstr)
    return replace(facts, ram_blocks=(*others, RamBlockInfo(idstr, used_bytes, total)))


def test_the_same_machine_on_a_newer_qemu_differs_in_nothing() -> None:
    assert found(SOURCE, DESTINATION) == []


def test_an_older_qemu_on_the_destination_is_a_warning() -> None:
    source = replace(SOURCE, qemu_version=(10, 0, 2))
    destination = replace(DESTINATION, qemu_version=(7, 2, 22))
    text = "QEMU is older on the destination: source 10.0.2, destination 7.2.22"
    assert found(source, destination) == [("warning", text)]


@pytest.mark.parametrize(
    ("destination", "severity", "text"),
    [
        (
            replace(DESTINATION, machine_type="pc-i440fx-7.2"),
            "error",
            "machine type: source pc-q35-7.2, destination pc-i440fx-7.2",
        ),
        (replace(DESTINATION, vcpus=3), "error", "vCPUs: source 2, destination 3"),
        (replace(DESTINATION, max_vcpus=8), "error", "maximal vCPUs: source 4, destination 8"),
        (
            replace(DESTINATION, ram_bytes=256 * MIB),
            "error",
            "RAM: source 536870912 bytes, destination 268435456 bytes",
        ),
        (
            with_block(DESTINATION, "pc.ram", 256 * MIB, 256 * MIB),
            "error",
            "length of RAM block pc.ram: source 536870912 bytes, destination 268435456 bytes",
        ),
        (
            with_block(DESTINATION, "pc.bios", 0x20000, 0x20000),
            "error",
            "length of RAM block pc.bios: source 262144 bytes, destination 131072 bytes",
        ),
        (
            with_block(DESTINATION, "/rom@etc/acpi/tables", 0x10000, 0x10000),
            "error",
            "length of RAM block /rom@etc/acpi/tables: "
            "source 131072 bytes, destination 65536 bytes",
        ),
        (
            replace(DESTINATION, ram_blocks=DESTINATION.ram_blocks[:2]),
            "error",
            "RAM block only on the source: pc.bios (262144 bytes)",
        ),
        (
            with_block(DESTINATION, "vm0", 4096, 4096),
            "warning",
            "RAM block only on the destination: vm0 (4096 bytes)",
        ),
        (
            replace(DESTINATION, uuid=None),
            "warning",
            "VM UUID: source 12345678-1234-1234-1234-123456789abc, destination none",
        ),
        (
            replace(DESTINATION, uuid="0f"),
            "error",
            "VM UUID: source 12345678-1234-1234-1234-123456789abc, destination 0f",
        ),
        (
            replace(DESTINATION, accelerator="kvm"),
            "warning",
            "accelerator: source tcg, destination kvm",
        ),
        (
            replace(DESTINATION, run_state="prelaunch"),
            "error",
            "destination QEMU does not wait for a migration: it is 'prelaunch'",
        ),
        (
            with_cpu(DESTINATION, qom_type="max-x86_64-cpu"),
            "error",
            "CPU model: source EPYC, destination max",
        ),
        (
            with_cpu(DESTINATION, words={"1.ECX": 0b1000}),
            "error",
            "CPU features missing on the destination: sse3",
        ),
        (
            with_cpu(DESTINATION, words={"1.ECX": 0b1011}),
            "warning",
            "CPU features only on the destination: pclmulqdq",
        ),
        (
            with_cpu(DESTINATION, words={"1.ECX": 0b1001, "e.EAX": 0b100}),
            "warning",
            "CPU features only on the destination: CPUID e.EAX bit 2",
        ),
        (
            with_cpu(DESTINATION, signature="AuthenticAMD 6/6/3"),
            "warning",
            "CPU signature: source AuthenticAMD 23/1/2, destination AuthenticAMD 6/6/3",
        ),
        (
            replace(
                DESTINATION,
                devices=(
                    *DESTINATION.devices,
                    Device("0000:00:07.0", "virtio-rng-pci", "1af4:1005"),
                ),
            ),
            "error",
            "device only on the destination: virtio-rng-pci at 0000:00:07.0",
        ),
        (
            replace(DESTINATION, devices=DESTINATION.devices[:2]),
            "error",
            "device only on the source: virtio-blk-pci at 0000:00:03.0:00.0",
        ),
        (
            replace(DESTINATION, devices=DESTINATION.devices[1:]),
            "error",
            "device only on the source: PCI device 8086:29c0 at 0000:00:00.0",
        ),
        (
            replace(
                DESTINATION,
                devices=(
                    DESTINATION.devices[0],
                    Device("0000:00:02.0", "virtio-net-pci", "1af4:1041"),
                    DESTINATION.devices[2],
                ),
            ),
            "error",
            "device at 0000:00:02.0: source virtio-net-pci (1af4:1000), "
            "destination virtio-net-pci (1af4:1041)",
        ),
    ],
)
def test_a_difference_is_named_with_its_severity(
    destination: MachineFacts, severity: str, text: str
) -> None:
    assert found(SOURCE, destination) == [(severity, text)]


def test_kvm_to_tcg_is_an_error() -> None:
    source = replace(SOURCE, accelerator="kvm")
    assert found(source, DESTINATION) == [("error", "accelerator: source kvm, destination tcg")]


@pytest.mark.parametrize("state", ["inmigrate", "postmigrate"])
def test_a_source_without_a_guest_is_an_error(state: str) -> None:
    text = f"source QEMU has no guest to migrate: it is '{state}'"
    assert found(replace(SOURCE, run_state=state), DESTINATION) == [("error", text)]


def test_features_the_source_asked_for_in_vain_may_appear() -> None:
    assert found(SOURCE, with_cpu(DESTINATION, words={"1.ECX": 0b1001, "7.0.EBX": 1})) == []


@pytest.mark.parametrize("hinting", [True, False])
@pytest.mark.parametrize(
    "balloon", [BalloonFacts(False, False), BalloonFacts(True, False), None]
)
def test_hints_in_use_need_a_destination_that_offers_them(
    hinting: bool, balloon: BalloonFacts | None
) -> None:
    source = replace(SOURCE, balloon=BalloonFacts(hint_offered=True, hinting=hinting))
    differences = found(source, replace(DESTINATION, balloon=balloon))
    lacks = hinting and balloon is not None and not balloon.hint_offered
    assert [severity for severity, _ in differences] == ["error"] * lacks
    assert all("give it free-page-hint=on" in text for _, text in differences)


def test_save_areas_without_their_feature_are_not_compared() -> None:
    source = with_cpu(SOURCE, words={"1.ECX": 0b1001, "d.0.EAX": 0x2E7})
    destination = with_cpu(DESTINATION, words={"1.ECX": 0b1001, "d.0.EAX": 0x207})
    assert found(source, destination) == []


@pytest.mark.parametrize(
    ("register", "bit"), [("1.EDX", 28), ("80000001.ECX", 1), ("7.0.EBX", 22)]
)
def test_bits_that_follow_from_the_vcpus_or_nothing_has_are_not_compared(
    register: str, bit: int
) -> None:
    words = {"1.ECX": 0b1001, register: 1 << bit}
    assert found(SOURCE, with_cpu(DESTINATION, words=words)) == []
    assert found(with_cpu(SOURCE, words=words), DESTINATION) == []


@pytest.mark.parametrize("used_bytes", [0x1000, 0x200000])
def test_generated_tables_may_differ_in_length_as_far_as_they_can_grow(used_bytes: int) -> None:
    source = with_block(SOURCE, "/rom@etc/acpi/tables", used_bytes, 0x200000)
    assert found(source, DESTINATION) == []


def test_one_of_two_like_devices_missing_is_seen() -> None:
    port = Device("0000:00:05.0/", "usb-kbd", "")
    source = replace(SOURCE, devices=(*SOURCE.devices, port, port))
    destination = replace(DESTINATION, devices=(*SOURCE.devices, port))
    text = "device only on the source: usb-kbd at 0000:00:05.0/"
    assert found(source, destination) == [("error", text)]


def test_errors_come_before_warnings() -> None:
    destination = replace(DESTINATION, uuid=None, ram_blocks=())
    severities = [item.severity for item in compare(SOURCE, destination)]
    assert severities == [Severity.ERROR] * 3 + [Severity.WARNING]


@pytest.mark.parametrize("uuid", [None, SOURCE.uuid])
def test_facts_survive_json(uuid: str | None) -> None:
    facts = replace(SOURCE, uuid=uuid)
    assert MachineFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


def test_facts_that_a_newer_peer_adds_are_ignored() -> None:
    assert MachineFacts.from_dict({**SOURCE.to_dict(), "numa": []}) == SOURCE


@pytest.mark.parametrize("key", list(SOURCE.to_dict()))
@pytest.mark.parametrize("value", [3.5, True, -1, 2**64, "\x1b[2J", "x" * 513, [1], {"a": -1}])
def test_a_fact_of_another_type_or_out_of_range_is_refused(key: str, value: object) -> None:
    with pytest.raises(MessageError):
        MachineFacts.from_dict({**SOURCE.to_dict(), key: value})


@pytest.mark.parametrize("key", [key for key in SOURCE.to_dict() if key not in OPTIONAL])
def test_a_missing_fact_is_refused(key: str) -> None:
    facts = SOURCE.to_dict()
    del facts[key]
    with pytest.raises(MessageError, match=key):
        MachineFacts.from_dict(facts)


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("ram_blocks", [["pc.ram", 1, 1], ["x", 1]], r"ram_blocks\[1\]"),
        ("ram_blocks", [["pc.ram", "1", 1]], r"ram_blocks\[0\]"),
        ("devices", [["a", "b", 3]], r"devices\[0\]"),
        ("devices", [["a", "b", "c"]] * (MAX_ITEMS + 1), "devices"),
        ("qemu_version", [7, 2], "qemu_version"),
        ("balloon", [True, 1], "balloon"),
        ("restore_balloon_bytes", 0, "restore_balloon_bytes"),
        ("restore_balloon_bytes", (512 << 20) + 1, "expected 1 to 536870912"),
    ],
)
def test_a_refusal_says_where(key: str, value: object, where: str) -> None:
    with pytest.raises(MessageError, match=where):
        MachineFacts.from_dict({**SOURCE.to_dict(), key: value})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(list(SOURCE.to_dict())), inner)
        ),
        max_leaves=10,
    )
)
def test_garbage_raises_only_message_error(garbage: object) -> None:
    with pytest.raises(MessageError):
        MachineFacts.from_dict(garbage)


def test_what_changes_by_itself_is_no_change_of_the_machine() -> None:
    tables = "/rom@etc/acpi/tables"
    later = with_block(SOURCE, tables, 0x40000, 0x200000)
    later = replace(later, run_state="paused", balloon=None, restore_balloon_bytes=None)
    assert compare_with_before(SOURCE, later) == []


def test_a_machine_that_is_not_what_it_was_is_told_from_it() -> None:
    disk, card = SOURCE.devices[2], Device("0000:00:04.0", "virtio-rng-pci", "1af4:1005")
    longer = with_block(SOURCE, "pc.ram", 1024 * MIB, 1024 * MIB)
    later = replace(
        with_cpu(longer, words={}),
        vcpus=3,
        ram_blocks=(longer.ram_blocks[-1], RamBlockInfo("mem1", MIB, MIB)),
        devices=(*SOURCE.devices[:2], card),
    )
    assert compare_with_before(SOURCE, later) == [
        "vCPUs: before 2, now 3",
        "CPU: another model, or other features",
        "RAM block gone: pc.bios",
        "RAM block new: mem1",
        f"length of RAM block pc.ram: before {512 * MIB} bytes, now {1024 * MIB} bytes",
        f"device gone: {disk.qom_type} at {disk.place}",
        f"device new: {card.qom_type} at {card.place}",
    ]
