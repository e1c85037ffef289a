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
