"""``migrate-lab round-trip``: what it takes, what it hands on, and its table."""

from pathlib import Path

import pytest

from migrate.cli import lab
from migrate.errors import ParamsError
from migrate.lab.engine import EngineMode
from migrate.lab.guest_vm import GuestConfig
from migrate.lab.measured import Measurement
from migrate.lab.qemu_binaries import QemuBinary
from migrate.lab.round_trip import Trip, trips_table


def leg(total_ms: float, sent_bytes: int) -> Measurement:
    return Measurement(
        total_ms=total_ms,
        wall_ms=total_ms + 400,
        downtime_events_ms=50,
        downtime_qemu_ms=48,
        downtime_heartbeat_ms=55,
        sent_bytes=sent_bytes,
        returned_bytes=1000,
        cpu_s=2.5,
        start_cpu_s=0.3,
        ended_ms=total_ms + 500,
    )


def trip(*, checkpoint: bool) -> Trip:
    return Trip(
        config=GuestConfig(),
        binary=QemuBinary(Path("/bin/false"), (7, 2, 22)),
        link="200mbit",
        stay_s=30,
        engine=EngineMode(("--cache", "0"), ("--cache-max", "1MiB")),
        checkpoint=checkpoint,
        downtime_limit_ms=300,
        timeout_s=120,
    )


def test_each_host_has_its_folder_whichever_side_it_is() -> None:
    a, b = Path("a"), Path("b")
    assert trip(checkpoint=True).mode(a, b) == EngineMode(
        ("--checkpoint", "a", "--cache", "0"), ("--checkpoint", "b", "--cache-max", "1MiB")
    )
    assert trip(checkpoint=True).mode(b, a) == EngineMode(
        ("--checkpoint", "b", "--cache", "0"), ("--checkpoint", "a", "--cache-max", "1MiB")
    )
    assert trip(checkpoint=False).mode(a, b) == trip(checkpoint=False).engine


def test_the_second_leg_is_divided_by_the_first_of_the_same_trip() -> None:
    trips = [(leg(10_000, 400), leg(1_000, 20)), (leg(20_000, 400), leg(1_000, 40))]
    table = trips_table(trips)
    there, back, ratio = (dict(zip(table.headers, row, strict=True)) for row in table.rows)
    assert there["total s"] == "15.00 (10.00-20.00)"
    assert back["total s"] == "1.00 (1.00-1.00)"
    assert ratio["leg"] == "B to A / A to B"
    assert ratio["total s"] == "0.075 (0.050-0.100)"
    assert ratio["MB on the link"] == "0.075 (0.050-0.100)"
    assert ratio["CPU s"] == "-"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--guest", "busy"), "expected a guest"),
        (("--qemu", "6.0"), "expected QEMU"),
        (("--link", "1 furlong"), "not a rate"),
        (("--repeats", "0"), "at least 1 repeat"),
        (("--stay", "long"), "not a time"),
    ],
)
def test_impossible_options_are_refused(
    words: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        lab.main(["round-trip", *words])
    assert exit_info.value.code == ParamsError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
