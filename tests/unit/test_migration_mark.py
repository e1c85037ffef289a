"""Which completed migration can be the one that was marked."""

from dataclasses import replace
from typing import Any

import pytest

from migrate.qemu.migration_mark import MigrationMark
from migrate.qemu.queries import MigrationStatus, parse_migration_status

COUNTERS = {
    "transferred": 9_032_535,
    "remaining": 0,
    "total": 34_086_912,
    "duplicate": 6332,
    "normal": 2187,
    "dirty-pages-rate": 0,
    "mbps": 602.2,
    "dirty-sync-count": 2,
}


def status(word: str, **changes: int) -> MigrationStatus:
    counters: dict[str, Any] = dict(COUNTERS)
    found: dict[str, Any] = {"status": word, "setup-time": 3, "total-time": 123}
    if word == "completed":
        found["downtime"] = 110
    for name, value in changes.items():
        key = name.replace("_", "-")
        (counters if key in counters else found)[key] = value
    return parse_migration_status(found | {"ram": counters})


def marked(found: MigrationStatus) -> MigrationMark:
    mark = MigrationMark.of(found)
    assert mark is not None
    return mark


@pytest.mark.parametrize("total_ms", [123, 124, 90_000])
def test_a_migration_is_the_same_whenever_it_ended_since(total_ms: int) -> None:
    assert marked(status("device")).fits(status("completed", total_time=total_ms))


def test_a_shorter_one_is_another() -> None:
    assert not marked(status("active")).fits(status("completed", total_time=122))


@pytest.mark.parametrize(
    "changes",
    [
        {"duplicate": 6331},
        {"normal": 2188},
        {"dirty_sync_count": 3},
        {"transferred": 9_032_536},
        {"setup_time": 4},
    ],
    ids="".join,
)
def test_one_that_counts_otherwise_is_another(changes: dict[str, int]) -> None:
    assert not marked(status("active")).fits(status("completed", **changes))


def test_of_one_that_had_completed_the_times_are_known() -> None:
    mark = marked(status("completed"))
    assert mark.fits(status("completed"))
    assert not mark.fits(status("completed", total_time=124))
    assert not mark.fits(status("completed", downtime=109))


def test_what_is_not_known_of_it_tells_nothing() -> None:
    mark = MigrationMark(6332, 2187)
    assert mark.fits(status("completed", total_time=1, setup_time=50))
    assert not mark.fits(status("completed", normal=2188))
    longer = replace(mark, total_time_ms=200)
    assert not longer.fits(status("completed", total_time=199))


def test_an_incoming_migration_counts_nothing() -> None:
    arrived = parse_migration_status({"status": "completed"})
    assert MigrationMark.of(arrived) is None
    assert not marked(status("active")).fits(arrived)
    assert not arrived.has_left
    assert status("completed").has_left
    assert not status("failed").has_left
