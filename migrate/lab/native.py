"""QEMU's own migration from one lab guest to another, over QMP: what the engine is up against."""

from dataclasses import dataclass
from typing import Final

import trio

from migrate.errors import GuestError, GuestOn
from migrate.lab.measured import Endpoint, Stopwatch
from migrate.qemu import queries
from migrate.qemu.qmp_client import QmpClient
from migrate.units import MIB
from proto.qemu.qmp import JsonValue

UNLIMITED_BYTES_PER_S: Final = 2**63 - 1 - 2**20
"""The largest ``max-bandwidth``; the engine sets the same."""

PORT: Final = 7000
POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class NativeMode:
    """Which of QEMU's features are on.

    Attributes:
        multifd_channels: 0: one connection.
        multifd_compression: ``none``, ``zlib`` or ``zstd``; zstd at level 1, QEMU's default.
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
        if self.multifd_compression == "zstd":
            values["multifd-zstd-level"] = 1
        if self.xbzrle_cache_bytes:
            values["xbzrle-cache-size"] = self.xbzrle_cache_bytes
        return values


NATIVE_MODES: Final = {
    "plain": NativeMode(),
    "xbzrle": NativeMode(xbzrle_cache_bytes=128 * MIB),
    "multifd": NativeMode(multifd_channels=2),
    "multifd-zstd": NativeMode(multifd_channels=2, multifd_compression="zstd"),
}


@dataclass(frozen=True, slots=True)
class NativeWay:
    """QEMU migrates by itself.

    Attributes:
        mode: Set on both sides before the destination listens.
        endpoint: The destination; waits with ``-incoming defer``.
        address: The destination's IPv4 address on the link.
        downtime_limit_ms: QEMU's downtime limit.
    """

    mode: NativeMode
    endpoint: Endpoint
    address: str
    downtime_limit_ms: int

    async def migrate(self, source: Endpoint, watch: Stopwatch) -> None:
        """Migrate, and return when the source says ``completed``; the deadline is the caller's.

        Raises:
            GuestError: QEMU refused or failed it.
        """
        for end in (source, self.endpoint):
            await queries.set_capabilities(end.monitor, self.mode.capabilities())
            await queries.set_parameters(
                end.monitor, self.mode.parameters(self.downtime_limit_ms)
            )
        uri = f"tcp:{self.address}:{PORT}"
        await queries.migrate_incoming(self.endpoint.monitor, uri)
        with source.monitor.listen("MIGRATION") as events:
            await queries.migrate(source.monitor, uri)
            while (await events.next()).data["status"] not in queries.ENDED_STATUSES:
                pass
        status = await queries.query_migrate(source.monitor)
        if status.status != "completed":
            raise GuestError(
                f"QEMU's migration ended as '{status.status}': "
                f"{status.error_desc or 'no reason'}",
                guest_on=GuestOn.SOURCE,
            )

    async def cancel(self, source: Endpoint) -> None:
        """Call a migration off and wait until nothing is under way; the guest runs on."""
        await queries.migrate_cancel(source.monitor)
        await wait_ended(source.monitor)


async def wait_ended(monitor: QmpClient) -> None:
    """Wait until QEMU has no migration under way; it leaves no event of that to rely on."""
    while not (await queries.query_migrate(monitor)).has_ended:  # noqa: ASYNC110 - QEMU is asked
        await trio.sleep(POLL_S)
