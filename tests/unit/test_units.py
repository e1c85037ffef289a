"""Sizes, rates and times: what is read, what is refused, what is printed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.units import (
    duration_text,
    format_count,
    format_ms,
    format_rate,
    format_size,
    parse_duration_ns,
    parse_rate,
    parse_size,
    rate_text,
    size_text,
)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4096", 4096),
        ("0", 0),
        ("12B", 12),
        ("4KiB", 4096),
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("1tib", 1 << 40),
        ("10MB", 10_000_000),
        (" 2 kB ", 2000),
        ("0.3KiB", 307),
    ],
)
def test_sizes_are_read(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("200Mbit", 25_000_000),
        ("200mbit/s", 25_000_000),
        ("1Gbit", 125_000_000),
        ("2.5Gbit", 312_500_000),
        ("800kbit", 100_000),
        ("80bit", 10),
        ("10MB", 10_000_000),
        ("10MB/s", 10_000_000),
        ("8MiB", 8 << 20),
    ],
)
def test_rates_are_read_as_bytes_per_second(text: str, bytes_per_s: int) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("300ms", 300_000_000),
        ("5s", 5_000_000_000),
        ("1.5s", 1_500_000_000),
        ("5min", 300_000_000_000),
        ("1h", 3_600_000_000_000),
        ("20us", 20_000),
        ("7ns", 7),
    ],
)
def test_times_are_read_as_nanoseconds(text: str, ns: int) -> None:
    assert parse_duration_ns(text) == ns


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("512M", "ambiguous: write MiB"),
        ("12parsec", "unknown unit 'parsec'"),
        ("200Mbit", "unknown unit 'Mbit'"),
        ("", "write it like 512MiB"),
        ("-4KiB", "write it like 512MiB"),
        ("4 KiB x", "write it like 512MiB"),
        ("1e3", "unknown unit|write it like"),
        ("٤KiB", "write it like 512MiB"),
        ("9" * 5000, "write it like 512MiB"),
    ],
)
def test_what_is_no_size_is_refused_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("200", "has no unit: write 200Mbit"),
        ("200Mbps", "ambiguous"),
        ("200Mb", "ambiguous"),
        ("200MBps", "ambiguous"),
        ("200M", "unknown unit 'M'"),
        ("fast", "write it like 200Mbit"),
    ],
)
def test_a_rate_that_could_mean_bits_or_bytes_is_refused(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("300", "write 300ms or 300s"), ("3 weeks", "unknown unit 'weeks'"), ("soon", "300ms")],
)
def test_what_is_no_time_is_refused_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        parse_duration_ns(text)


@given(st.integers(min_value=0, max_value=1 << 50))
def test_exact_texts_read_back_as_the_same_number(number: int) -> None:
    assert parse_size(size_text(number)) == number
    assert parse_rate(rate_text(number)) == number
    assert parse_duration_ns(duration_text(number)) == number


def test_exact_texts_use_the_largest_unit_that_fits() -> None:
    assert size_text(64 << 20) == "64MiB"
    assert rate_text(25_000_000) == "200Mbit"
    assert duration_text(300_000_000_000) == "5min"


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (4096, "4.00 KiB"),
        (1_572_864, "1.50 MiB"),
        (700 << 20, "700 MiB"),
        (1023 << 20, "1.00 GiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes_for_the_eye_have_three_digits(n_bytes: int, text: str) -> None:
    assert format_size(n_bytes) == text


@pytest.mark.parametrize(
    ("rate_bps", "text"),
    [
        (0, "0 bit/s"),
        (25_000_000, "200 Mbit/s"),
        (24_625_000, "197 Mbit/s"),
        (2e9, "16.0 Gbit/s"),
    ],
)
def test_rates_for_the_eye_are_in_bits(rate_bps: float, text: str) -> None:
    assert format_rate(rate_bps) == text


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.0, "0.0 ms"),
        (3.21, "3.2 ms"),
        (312.4, "312 ms"),
        (14_180.0, "14.2 s"),
        (99_960.0, "1 min 40 s"),
        (123_000.0, "2 min 03 s"),
        (3_725_000.0, "1 h 02 min"),
    ],
)
def test_times_for_the_eye(ms: float, text: str) -> None:
    assert format_ms(ms) == text


def test_counts_have_their_thousands_apart() -> None:
    assert format_count(1_262_144) == "1 262 144"
