"""QEMU's own migration from one lab guest to another, over QMP: what the engine is up against."""

from dataclasses import dataclass
from typing import Final

from migrate.errors import GuestError, GuestOn
from migrate.lab.measured import Endpoint
from migrate.qemu import queries
from proto.qemu.qmp import JsonValue

UNLIMITED_BYTES_PER_S: Final = 2**63 - 1 - 2**20
"""The largest ``max-bandwidth``; the engine sets the same."""

PORT: Final = 7000


@dataclass(frozen=True, slots=True)
class NativeMode:
    """Which of QEMU's features are on.

    Attributes:
        multifd_channels: 0: one connection.
        multifd_compression: ``none``, ``zlib`` or ``zstd``.
        xbzrle_cache_bytes: 0: off; else a power of two.
    """

    multifd_channels: int = 0
    multifd_compression: str = "none"
    xbzrle_cache_bytes: int = 0

    def capabilities(self) -> dict[str, bool]:
        """Return the capabilities that matter; set all of them, so that no earlier run shows."""
        return {
            "return-path": True,
            "events": True,
            "multifd": self.multifd_channels > 0,
            "xbzrle": self.xbzrle_cache_bytes > 0,
        }

    def parameters(self, downtime_limit_ms: int) -> dict[str, JsonValue]:
        """Return the parameters that matter, likewise."""
        values: dict[str, JsonValue] = {
            "max-bandwidth": UNLIMITED_BYTES_PER_S,
            "downtime-limit": downtime_limit_ms,
            "multifd-compression": self.multifd_compression,
        }
        if self.multifd_channels:
            values["multifd-channels"] = self.multifd_channels
        if self.xbzrle_cache_bytes:
            values["xbzrle-cache-size"] = self.xbzrle_cache_bytes
        return values


async def migrate_natively(
    mode: NativeMode,
    source: Endpoint,
    destination: Endpoint,
    *,
    address: str,
    downtime_limit_ms: int,
) -> None:
    """Migrate, and return when the source QEMU says ``completed``; the deadline is the caller's.

    Args:
        mode: Set on both sides before the destination listens.
        source: Runs.
        destination: Waits with ``-incoming defer``.
        address: The destination's IPv4 address on the link.
        downtime_limit_ms: QEMU's downtime limit.

    Raises:
        GuestError: QEMU refused or failed it.
    """
    for end in (source, destination):
        await queries.set_capabilities(end.monitor, mode.capabilities())
        await queries.set_parameters(end.monitor, mode.parameters(downtime_limit_ms))
    uri = f"tcp:{address}:{PORT}"
    await queries.migrate_incoming(destination.monitor, uri)
    with source.monitor.listen("MIGRATION") as events:
        await queries.migrate(source.monitor, uri)
        while (await events.next()).data["status"] not in queries.ENDED_STATUSES:
            pass
    status = await queries.query_migrate(source.monitor)
    if status.status != "completed":
        raise GuestError(
            f"QEMU's migration ended as '{status.status}': {status.error_desc or 'no reason'}",
            guest_on=GuestOn.SOURCE,
        )
