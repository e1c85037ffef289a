"""What may wait for the link while the guest runs."""

import pytest

from migrate.sending import running_backlog_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("raw_bps", "wanted"),
    [
        (1e6, MIB),
        (24e6, 1_200_000),  # 200 Mbit/s of pages that do not compress
        (70e6, 3 * MIB),
        (150e6, 6_000_000),
        (2e9, 8 * MIB),
    ],
)
def test_what_waits_is_bounded_in_bytes_and_in_time(raw_bps: float, wanted: int) -> None:
    assert running_backlog_bytes(raw_bps) == wanted


@pytest.mark.parametrize(
    ("to_come_bytes", "more"),
    [
        (
            80 * MIB,
            150e6 * 80 * MIB / 8e9,
        ),  # gone by the time that so many zero pages are passed
        (64 << 30, 150e6 * 0.12),
    ],
)
def test_more_may_wait_while_much_memory_is_to_come(to_come_bytes: int, more: float) -> None:
    assert running_backlog_bytes(150e6, to_come_bytes) == int(6_000_000 + more)


def test_what_waits_early_is_bounded_too() -> None:
    assert running_backlog_bytes(2e9, 64 << 30) == 40 * MIB
