"""What the engine asks of a QEMU: QMP's names and shapes to ours, and nowhere else.

Every command, capability, parameter and run state the engine uses has its QAPI name here;
results become frozen dataclasses with units in their names. Names hold for QEMU 7.2 and 10.0.
"""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import trio

from migrate.errors import GuestError, QmpInterruptedError
from migrate.qemu.answers import Fields, execute_list
from migrate.qemu.qmp_client import QmpClient
from proto.qemu.qmp import JsonValue

_Name = TypeVar("_Name", bound=str)  # a mapping's keys do not take subclasses otherwise

SETTLE_S: Final = 0.05
"""How long QEMU 7.2 may take from saying ``completed`` to storing the numbers of it."""


class Capability(enum.StrEnum):
    """Migration capabilities the engine sets."""

    RETURN_PATH = "return-path"
    EVENTS = "events"
    LATE_BLOCK_ACTIVATE = "late-block-activate"
    PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
    SWITCHOVER_ACK = "switchover-ack"
    AUTO_CONVERGE = "auto-converge"
    MULTIFD = "multifd"
    DIRTY_BITMAPS = "dirty-bitmaps"
    X_IGNORE_SHARED = "x-ignore-shared"


class Parameter(enum.StrEnum):
    """Migration parameters the engine sets, with QMP's units."""

    DOWNTIME_LIMIT_MS = "downtime-limit"
    MAX_BANDWIDTH_BYTES_PER_S = "max-bandwidth"
    AVAIL_SWITCHOVER_BANDWIDTH_BYTES_PER_S = "avail-switchover-bandwidth"
    MULTIFD_CHANNELS = "multifd-channels"
    MULTIFD_COMPRESSION = "multifd-compression"
    ZERO_PAGE_DETECTION = "zero-page-detection"
    CPU_THROTTLE_INITIAL_PERCENT = "cpu-throttle-initial"
    CPU_THROTTLE_INCREMENT_PERCENT = "cpu-throttle-increment"
    MAX_CPU_THROTTLE_PERCENT = "max-cpu-throttle"


ENDED_STATUSES: Final = frozenset({"none", "completed", "failed", "cancelled"})
"""Migration statuses in which nothing is under way."""

UNDONE_STATUSES: Final = frozenset({"failed", "cancelled"})
"""Those of a migration that came to nothing: QEMU still has its guest."""

RUN_STATE_INCOMING: Final = "inmigrate"
RUN_STATE_COMPLETED_SOURCE: Final = "postmigrate"
RUN_STATE_SWITCHOVER: Final = "finish-migrate"


@dataclass(frozen=True, slots=True)
class QemuVersion:
    """QEMU's version, comparable by ``number``; ``package`` is the distribution's text."""

    number: tuple[int, int, int]
    package: str

    def __str__(self) -> str:
        return ".".join(str(part) for part in self.number)


@dataclass(frozen=True, slots=True)
class RunState:
    """Whether vCPUs run, and QEMU's word for the state (``running``, ``paused``, …)."""

    status: str
    running: bool


@dataclass(frozen=True, slots=True)
class RamStatus:
    """QEMU's own counters of a migration's RAM.

    Attributes:
        transferred_bytes: 7.2: RAM only; 10.0: all bytes written, exact.
        remaining_bytes: Not yet sent of the last synced dirty bitmap; 0 at completion.
        total_bytes: Size of all RAM blocks that migrate.
        zero_pages: Pages sent as zero pages.
        normal_pages: Pages sent with data.
        dirty_pages_rate: Pages per second; 0 until a sync over a second after the first.
        mbps: Megabits per second in the last window of 100 ms or more.
        dirty_sync_count: Times the dirty bitmap was synced.
    """

    transferred_bytes: int
    remaining_bytes: int
    total_bytes: int
    zero_pages: int
    normal_pages: int
    dirty_pages_rate: int
    mbps: float
    dirty_sync_count: int


@dataclass(frozen=True, slots=True)
class MigrationStatus:
    """``query-migrate``; ``None`` where QEMU says nothing.

    ``status`` is ``none`` before any migration, and on 7.2 while an incoming one only listens.
    """

    status: str
    total_time_ms: int | None
    setup_time_ms: int | None
    downtime_ms: int | None
    expected_downtime_ms: int | None
    error_desc: str | None
    throttle_percent: int | None
    ram: RamStatus | None

    @property
    def has_ended(self) -> bool:
        """Nothing is under way: never started, completed, failed or cancelled."""
        return self.status in ENDED_STATUSES

    @property
    def has_left(self) -> bool:
        """An outgoing migration completed; an incoming one has no times."""
        return self.status == "completed" and self.total_time_ms is not None


@dataclass(frozen=True, slots=True)
class RamBlockInfo:
    """A RAM block: bytes in use now, and bytes it may grow to (more only if resizable)."""

    idstr: str
    used_bytes: int
    total_bytes: int


def parse_migration_status(value: JsonValue) -> MigrationStatus:
    """Read a ``query-migrate`` result.

    Raises:
        GuestError: It lacks a field or has one of another type.
    """
    command = "query-migrate"
    fields = Fields(command, value)
    ram = None
    if value.get("ram") is not None:
        counters = Fields(command, value["ram"])
        ram = RamStatus(
            transferred_bytes=counters.integer("transferred"),
            remaining_bytes=counters.integer("remaining"),
            total_bytes=counters.integer("total"),
            zero_pages=counters.integer("duplicate"),
            normal_pages=counters.integer("normal"),
            dirty_pages_rate=counters.integer("dirty-pages-rate"),
            mbps=counters.number("mbps"),
            dirty_sync_count=counters.integer("dirty-sync-count"),
        )
    return MigrationStatus(
        status=fields.text_or_none("status") or "none",
        total_time_ms=fields.integer_or_none("total-time"),
        setup_time_ms=fields.integer_or_none("setup-time"),
        downtime_ms=fields.integer_or_none("downtime"),
        expected_downtime_ms=fields.integer_or_none("expected-downtime"),
        error_desc=fields.text_or_none("error-desc"),
        throttle_percent=fields.integer_or_none("cpu-throttle-percentage"),
        ram=ram,
    )


async def query_migrate(client: QmpClient) -> MigrationStatus:
    """Ask how the outgoing (or else the incoming) migration stands, as of this moment."""
    return parse_migration_status(await client.execute("query-migrate"))


async def query_migrate_settled(client: QmpClient) -> MigrationStatus:
    """As ``query_migrate``, but with the final numbers once it says ``completed``.

    7.2 says ``completed`` a moment before it stores downtime and total time, so a downtime of 0
    is asked for a second time. A paused guest's downtime may really be 0.
    """
    status = await query_migrate(client)
    if status.status == "completed" and not status.downtime_ms:
        await trio.sleep(SETTLE_S)
        status = await query_migrate(client)
    return status


async def query_run_state(client: QmpClient) -> RunState:
    """Ask whether the vCPUs run."""
    fields = Fields("query-status", await client.execute("query-status"))
    return RunState(fields.text("status"), fields.boolean("running"))


def version_of(client: QmpClient) -> QemuVersion:
    """The version in the monitor's greeting."""
    return QemuVersion(client.greeting.version, client.greeting.package)


async def query_version(client: QmpClient) -> QemuVersion:
    """Ask for the version; proves that the main loop answers, unlike ``version_of``."""
    answer = await client.execute("query-version")
    fields = Fields("query-version", answer)
    numbers = Fields("query-version", answer.get("qemu"))
    return QemuVersion(
        (numbers.integer("major"), numbers.integer("minor"), numbers.integer("micro")),
        fields.text_or_none("package") or "",
    )


async def stop(client: QmpClient) -> None:
    """Pause the guest; on a QEMU that waits for a migration: stay paused after the load."""
    await client.execute("stop")


async def cont(client: QmpClient) -> None:
    """Let the guest run. Never while ``inmigrate``: the guest would start with the load."""
    await client.execute("cont")


async def migrate(client: QmpClient, uri: str) -> None:
    """Start the outgoing migration; a failing connection shows in ``query_migrate`` later."""
    await client.execute("migrate", uri=uri)


async def migrate_incoming(client: QmpClient, uri: str) -> None:
    """Let a QEMU started with ``-incoming defer`` listen; works once in its life."""
    await client.execute("migrate-incoming", uri=uri)


async def migrate_cancel(client: QmpClient) -> None:
    """Ask for the outgoing migration to end; it has when the status is ``cancelled``."""
    await client.execute("migrate_cancel")


async def migrate_continue(client: QmpClient) -> None:
    """Go on after ``pre-switchover``."""
    await client.execute("migrate-continue", state="pre-switchover")


async def yank_migration(client: QmpClient) -> None:
    """Cut the migration's sockets, out of band: works while QEMU's main lock is held."""
    await client.execute_oob("yank", instances=[{"type": "migration"}])


async def pmemsave(client: QmpClient, *, address: int, size_bytes: int, path: Path) -> None:
    """Let QEMU write guest-physical memory to a file of its own."""
    await client.execute("pmemsave", val=address, size=size_bytes, filename=str(path))


async def quit_qemu(client: QmpClient) -> None:
    """End QEMU and wait until its monitor closed; it may be gone already."""
    try:
        await client.execute("quit")
    except QmpInterruptedError:
        return
    await client.wait_closed()


async def query_capabilities(client: QmpClient) -> dict[str, bool]:
    """Ask which migration capabilities QEMU knows, and which of them are on."""
    command = "query-migrate-capabilities"
    items = [Fields(command, item) for item in await execute_list(client, command)]
    return {item.text("capability"): item.boolean("state") for item in items}


async def set_capabilities(client: QmpClient, states: Mapping[_Name, bool]) -> None:
    """Switch migration capabilities; refused by QEMU while a migration is under way."""
    items = [{"capability": str(name), "state": state} for name, state in states.items()]
    await client.execute("migrate-set-capabilities", capabilities=items)


async def query_parameters(client: QmpClient) -> dict[str, JsonValue]:
    """Ask for all migration parameters and their values."""
    answer = await client.execute("query-migrate-parameters")
    Fields("query-migrate-parameters", answer)
    return dict(answer)


async def set_parameters(client: QmpClient, values: Mapping[_Name, JsonValue]) -> None:
    """Set migration parameters; QEMU takes them at any time, also while it migrates."""
    named = {str(name): value for name, value in values.items()}
    await client.execute("migrate-set-parameters", **named)


async def query_ram_blocks(client: QmpClient) -> tuple[RamBlockInfo, ...]:
    """Ask for the RAM blocks that migrate, in no particular order.

    QMP has no such query; this reads the human monitor's table.
    """
    line = {"command-line": "info ramblock"}
    return parse_ram_blocks(await client.execute("human-monitor-command", **line))


_RAM_BLOCK_ROW: Final = re.compile(
    r"^\s*(?P<idstr>\S+)\s+[\d.]+ (?:B|[KMGT]iB)"  # name, page size
    r"\s+0x[0-9a-f]+\s+0x(?P<used>[0-9a-f]+)\s+0x(?P<total>[0-9a-f]+)\b"  # offset, used, total
)
_UNNAMED_ROW: Final = re.compile(r"^\s*[\d.]+ (?:B|[KMGT]iB)\s+0x")


def parse_ram_blocks(text: JsonValue) -> tuple[RamBlockInfo, ...]:
    """Read the table of ``info ramblock``; 10.0 has two more columns at its right end.

    Rows without a name are blocks that never migrate.

    Raises:
        GuestError: It is not that table.
    """
    if not isinstance(text, str) or "Block Name" not in text:
        raise GuestError(f"unexpected answer to 'info ramblock': {text!r:.80}")
    blocks = []
    for row in text.splitlines()[1:]:
        if not row.strip() or _UNNAMED_ROW.match(row):
            continue
        match = _RAM_BLOCK_ROW.match(row)
        if match is None:
            raise GuestError(f"unexpected row in 'info ramblock': {row.strip()!r:.120}")
        used_bytes, total_bytes = int(match["used"], 16), int(match["total"], 16)
        blocks.append(RamBlockInfo(match["idstr"], used_bytes, total_bytes))
    return tuple(blocks)


async def query_uuid(client: QmpClient) -> str | None:
    """Ask for the VM's UUID; ``None`` if it was given none."""
    uuid = Fields("query-uuid", await client.execute("query-uuid")).text("UUID")
    return None if set(uuid) <= {"0", "-"} else uuid.lower()


async def query_accelerator(client: QmpClient) -> str:
    """Ask whether KVM runs the guest: ``kvm``, or else ``tcg``."""
    fields = Fields("query-kvm", await client.execute("query-kvm"))
    return "kvm" if fields.boolean("enabled") else "tcg"


async def query_ram_bytes(client: QmpClient) -> int:
    """Ask for the guest's memory in bytes, plugged DIMMs included."""
    command = "query-memory-size-summary"
    fields = Fields(command, await client.execute(command))
    return fields.integer("base-memory") + (fields.integer_or_none("plugged-memory") or 0)


async def query_vcpu_paths(client: QmpClient) -> tuple[str, ...]:
    """Ask for the vCPUs' QOM paths, in order of their index."""
    command = "query-cpus-fast"
    cpus = [Fields(command, item) for item in await execute_list(client, command)]
    cpus.sort(key=lambda cpu: cpu.integer("cpu-index"))
    return tuple(cpu.text("qom-path") for cpu in cpus)


async def query_max_vcpus(client: QmpClient) -> int:
    """Ask how many vCPUs the machine can have, those present included."""
    return Fields("smp", await qom_get(client, "/machine", "smp")).integer("maxcpus")


@dataclass(frozen=True, slots=True)
class PciFunction:
    """A PCI device on a root bus, as the machine sees it whether or not firmware ran."""

    bus: int
    slot: int
    function: int
    vendor: int
    device: int


async def query_pci_root_devices(client: QmpClient) -> tuple[PciFunction, ...]:
    """Ask for the PCI devices on root buses.

    Devices behind bridges are left out: QEMU lists them only once the guest's firmware has
    numbered the buses, so never on a destination that waits.
    """
    command = "query-pci"
    functions = []
    for bus in await execute_list(client, command):
        bus_no = Fields(command, bus).integer("bus")
        for item in bus.get("devices", ()):
            place, ids = Fields(command, item), Fields(command, item.get("id"))
            functions.append(
                PciFunction(
                    bus=bus_no,
                    slot=place.integer("slot"),
                    function=place.integer("function"),
                    vendor=ids.integer("vendor"),
                    device=ids.integer("device"),
                )
            )
    return tuple(functions)


async def qom_children(client: QmpClient, path: str) -> dict[str, str]:
    """List the properties of a QOM object: their QOM types by name."""
    answer = await client.execute("qom-list", path=path)
    if not isinstance(answer, list):
        raise GuestError(f"unexpected answer to 'qom-list': {answer!r:.80}")
    items = [Fields("qom-list", item) for item in answer]
    return {item.text("name"): item.text("type") for item in items}


async def qom_get(client: QmpClient, path: str, name: str) -> JsonValue:
    """Read a QOM property; a property that cannot be read is a ``QmpCommandError``."""
    return await client.execute("qom-get", path=path, property=name)


async def query_cpu_words(client: QmpClient, cpu_path: str, name: str) -> dict[str, int]:
    """Read a CPU's ``feature-words`` or ``filtered-features``.

    Returns:
        Words that are not zero, by register, e.g. ``7.0.EBX``, ``80000001.ECX`` (hexadecimal).
    """
    answer = await qom_get(client, cpu_path, name)
    if not isinstance(answer, list):
        raise GuestError(f"unexpected value of '{name}': {answer!r:.80}")
    words = {}
    for item in answer:
        fields = Fields(name, item)
        leaf = f"{fields.integer('cpuid-input-eax'):x}"
        subleaf = fields.integer_or_none("cpuid-input-ecx")
        register = fields.text("cpuid-register")
        key = f"{leaf}.{register}" if subleaf is None else f"{leaf}.{subleaf:x}.{register}"
        if fields.integer("features"):
            words[key] = fields.integer("features")
    return words
