"""Over how many connections a source QEMU gives us its pages, and the settings for that.

For a destination QEMU see ``migrate.qemu.incoming_channels``.

With multifd a second thread of QEMU writes to us while the first one looks for dirty pages, and
its packets need no parsing page by page. It must be chosen before the migration begins.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from migrate.errors import QmpCommandError
from migrate.qemu import queries
from migrate.qemu.qmp_client import QmpClient
from migrate.qemu.queries import Capability, Parameter
from migrate.qemu.settings import ChangedSettings
from proto.qemu.qmp import JsonValue

AUTO_CHANNELS: Final = 2
"""Not settled: 1 to 4 measured alike on a busy machine; ``tools/bench-hop`` compares them."""

FIRST_AUTO_VERSION: Final = (10, 0, 0)
"""QEMU 7.2's migration thread spins while it waits for a free channel: on a slow link that costs a
whole processor all the time. Versions in between were not measured."""

SLOW_LINK_BPS: Final = 250_000_000
"""Below 2 Gbit/s the hop is never the limit, and what QEMU keeps in its packets is downtime."""

SECTIONS_BESIDE_RAM: Final = ("virtio-mem", "vfio-")
"""Devices that send more than RAM before its end, by the start of their type's name. That is passed
on without being understood, which does not go beside channels."""


@dataclass(frozen=True, slots=True)
class LocalChannels:
    """How many connections pages come over.

    Attributes:
        count: Channels beside the main connection; 0 = over that one.
        refusal: Why a wish for more was not granted; empty if it was.
        incoming: They lead into a QEMU.
    """

    count: int
    refusal: str = ""
    incoming: bool = False

    @property
    def settings(self) -> dict[str, JsonValue]:
        """Parameters that must be set; a version that does not know one needs it not."""
        if not self.count:
            return {}
        settings: dict[str, JsonValue] = {
            Parameter.MULTIFD_CHANNELS: self.count,
            Parameter.MULTIFD_COMPRESSION: "none",
        }
        if not self.incoming:
            # Packets are then full and in order, and zero pages cost nine bytes.
            settings[Parameter.ZERO_PAGE_DETECTION] = "legacy"
        return settings


def choose_channels(
    wish: int | None,
    max_bandwidth_bps: int | None,
    version: tuple[int, int, int],
    capabilities: Mapping[str, bool],
    device_types: Iterable[str],
) -> LocalChannels:
    """Decide before a migration.

    Args:
        wish: What the user asked for: 0 for none, None = as it is best.
        max_bandwidth_bps: What the user allows the link, None = as much as it takes.
        version: QEMU's.
        capabilities: The migration capabilities it knows, and whether they are on.
        device_types: QEMU's names of the machine's devices.
    """
    slow = max_bandwidth_bps is not None and max_bandwidth_bps < SLOW_LINK_BPS
    automatic = AUTO_CHANNELS if version >= FIRST_AUTO_VERSION and not slow else 0
    wanted = automatic if wish is None else wish
    if not wanted:
        return LocalChannels(0)
    refusal = refusal_of(capabilities, device_types)
    return LocalChannels(0 if refusal else wanted, refusal)


def refusal_of(capabilities: Mapping[str, bool], device_types: Iterable[str]) -> str:
    """Why a QEMU with these cannot have its pages come over channels; empty if it can."""
    if Capability.MULTIFD not in capabilities:
        return "this QEMU has no multifd"
    if capabilities.get(Capability.DIRTY_BITMAPS):
        return "dirty bitmaps migrate, too (capability dirty-bitmaps)"
    for name in device_types:
        if name.startswith(SECTIONS_BESIDE_RAM):
            return f"a device sends its state before the end of RAM: {name}"
    return ""


async def switch_on(
    client: QmpClient, settings: ChangedSettings, channels: LocalChannels
) -> LocalChannels:
    """Set what these channels need, before a migration; returns none where QEMU refuses."""
    if not channels.count:
        return channels
    try:
        known = await queries.query_parameters(client)
        ours = {name: value for name, value in channels.settings.items() if name in known}
        await settings.set_parameters(ours)
        await settings.set_capabilities({Capability.MULTIFD: True})
    except QmpCommandError as error:
        await settings.set_capabilities({Capability.MULTIFD: False})
        return LocalChannels(0, f"QEMU refuses multifd: {error.desc}")
    return channels
