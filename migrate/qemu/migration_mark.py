"""Which migration of a QEMU was ours, for who finds it completed and was not there.

QMP gives a migration no name. What it keeps of the last one are its counters, which stand still
once the stream is written: before the source is let go they are what they will be when it has
completed. A guest that ran in between does not come to the same ones again, unless it did nothing
at all; the times tell those apart that are known to the end.
"""

from dataclasses import dataclass

from migrate.qemu.queries import MigrationStatus


@dataclass(frozen=True, slots=True)
class MigrationMark:
    """One migration of a QEMU; ``None`` for what is not known of it.

    Attributes:
        zero_pages: Pages it sent as zero pages.
        normal_pages: Pages it sent with data.
        dirty_sync_count: Times the dirty bitmap was synced.
        transferred_bytes: As QEMU counts them.
        setup_time_ms: What it took to begin.
        total_time_ms: What it took until this mark was made.
        downtime_ms: Its downtime, once it had completed.
    """

    zero_pages: int
    normal_pages: int
    dirty_sync_count: int | None = None
    transferred_bytes: int | None = None
    setup_time_ms: int | None = None
    total_time_ms: int | None = None
    downtime_ms: int | None = None

    @classmethod
    def of(cls, status: MigrationStatus) -> "MigrationMark | None":
        """Mark the migration that QEMU is in, or was in last; ``None`` where it counts nothing."""
        ram = status.ram
        if ram is None:
            return None
        return cls(
            zero_pages=ram.zero_pages,
            normal_pages=ram.normal_pages,
            dirty_sync_count=ram.dirty_sync_count,
            transferred_bytes=ram.transferred_bytes,
            setup_time_ms=status.setup_time_ms,
            total_time_ms=status.total_time_ms,
            downtime_ms=status.downtime_ms,
        )

    def fits(self, status: MigrationStatus) -> bool:
        """Whether the migration that has completed there can be this one."""
        other = MigrationMark.of(status)
        if other is None:
            return False
        pairs = [
            (self.zero_pages, other.zero_pages),
            (self.normal_pages, other.normal_pages),
            (self.dirty_sync_count, other.dirty_sync_count),
            (self.transferred_bytes, other.transferred_bytes),
            (self.setup_time_ms, other.setup_time_ms),
            (self.downtime_ms, other.downtime_ms),
        ]
        if any(known not in {None, found} for known, found in pairs):
            return False
        known_ms, total_ms = self.total_time_ms, other.total_time_ms
        if known_ms is None or total_ms is None:
            return known_ms is None
        return total_ms == known_ms if self.downtime_ms is not None else total_ms >= known_ms
