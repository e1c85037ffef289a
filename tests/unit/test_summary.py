"""The text summary: complete, aligned, and clear about where the guest is."""

import re

import pytest

from migrate.errors import GuestOn, MigrationError
from migrate.report.old_copy import CheckpointReport, OldCopyReport
from migrate.report.report import BalloonReport, Integrity, Prediction, ReportBuilder, Role
from migrate.report.summary import guest_line, share_text, shortened, summary_lines
from tests.unit.report_sample import sample_report


def test_a_completed_migration_is_told_in_figures() -> None:
    text = "\n".join(summary_lines(sample_report()))
    for expected in (
        "migration completed\n  guest        destination, running\n",
        "total        1.78 s, 100 ms of it setting up",
        "downtime     176 ms\n"
        "               last pages 96 ms, device state 9.0 ms, load 31 ms\n"
        "               verify 18 ms, commit 22 ms\n",
        "on the wire  793 KiB for 1.64 MiB of pages (47 %)",
        "guest RAM    1.00 GiB",
        "commit       held",
        "QEMU         7.2.22",
        "integrity    equal, 262 410 pages compared",
    ):
        assert expected in text
    assert "error" not in text
    assert text.endswith("\n\nthe guest runs on the destination")


def test_the_tables_are_aligned() -> None:
    lines = summary_lines(sample_report())
    start = next(i for i, line in enumerate(lines) if line.startswith("  class"))
    table = lines[start : start + 6]
    column = table[0].index("pages") + len("pages")
    assert [line[:column].split() for line in table[1:]] == [
        ["zero", "30"], ["same", "0"], ["ref", "0"], ["delta", "90"], ["literal", "300"]
    ]  # fmt: skip
    rounds = next(line for line in lines if line.startswith("  round"))
    first = lines[lines.index(rounds) + 1]
    assert first.split() == [
        "0",
        "500",
        "ms",
        "140",
        "188",
        "KiB",
        "197",
        "Mbit/s",
        "-",
        "zstd:1",
        "-",
    ]
    assert len(first.rstrip()) == len(rounds)


def test_a_failed_migration_says_why_and_what_was_not_reached() -> None:
    error = MigrationError("the link broke", guest_on=GuestOn.SOURCE)
    lines = summary_lines(ReportBuilder("source", 0).failed(10**9, error, "running"))
    assert lines[0] == "migration failed"
    assert lines[1] == "  error        the link broke [failed]"
    assert "  downtime     none: the guest was not stopped" in lines
    assert "  integrity    not compared: it did not come to that" in lines
    assert "  on the wire  0 B for 0 B of pages (-)" in lines
    assert not any(line.startswith("  round") for line in lines)
    assert lines[-1] == "the guest runs on the source"


def test_a_guest_that_was_stopped_is_not_said_to_have_gone_on_all_the_time() -> None:
    builder = ReportBuilder("source", 0)
    builder.report.guest_stopped = True
    lines = summary_lines(builder.failed(1, MigrationError("the link broke"), "running"))
    assert "  downtime     the guest was stopped, and nobody saw when it went on" in lines


@pytest.mark.parametrize(
    ("role", "guest_on", "text"),
    [
        (
            "source",
            GuestOn.UNKNOWN,
            "ends with this command; whether the guest ran there, migr",
        ),
        ("source", GuestOn.NEITHER, "NEITHER side; the copy here ends with this command"),
        ("destination", GuestOn.UNKNOWN, "if migrate-src still lives, otherwise it is gone"),
        ("destination", GuestOn.NEITHER, "if migrate-src still lives, otherwise it is gone"),
        ("source", GuestOn.SOURCE, "not running: its state is 'paused'"),
    ],
)
def test_nobody_is_sent_to_the_monitor_of_a_simulated_guest(
    role: Role, guest_on: GuestOn, text: str
) -> None:
    builder = ReportBuilder(role, 0)
    builder.report.source = builder.report.destination = "simulate"
    error = MigrationError("the link broke", guest_on=guest_on)
    last = summary_lines(builder.failed(1, error, "paused"))[-1]
    assert text in last
    assert not re.search("QEMU|cont|query", last)


def test_everything_unusual_is_told() -> None:
    report = sample_report()
    report.integrity = Integrity(7, "a", "b", equal=False)
    report.opaque_rest = "section 'dirty-bitmap'"
    report.not_checked = ["the destination's CPU"]
    report.warnings = ["first", "second"]
    report.reconnects, report.outage_ms, report.bytes.resent = 2, 1500.0, 4 << 20
    report.back_to_precopy, report.back_to_precopy_stopped_ms = 2, 6600.0
    report.predicted = Prediction(14_000, 200)
    report.rounds[1].throttle_percent = 40
    report.balloon = BalloonReport(
        asked_bytes=1 << 28, before_bytes=1 << 30, kept_bytes=1 << 28, pages=196_608
    )
    report.free_page_hinting, report.never_sent_pages = True, 5_000
    report.old_copy = OldCopyReport(1200, 1000, 1000 * 4096, age_s=93.0)
    report.checkpoint = CheckpointReport("/old/vm.ram", kept=True, file_bytes=5_000_000)
    text = "\n".join(summary_lines(report))
    for expected in (
        "integrity    NOT EQUAL over 7 pages",
        "passed on    part of the stream as it was: section 'dirty-bitmap'",
        "not checked  the destination's CPU",
        "warning      first\n  warning      second",
        "reconnects   2, 1.50 s without a link, 4.00 MiB sent again",
        "went back    to pre-copy 2 times, after the guest had stood still for 6.60 s",
        "predicted    total 14.0 s, downtime 200 ms",
        "balloon      1.00 GiB, then 256 MiB: 196 608 pages travel as zero",
        "free pages   5 000 never travelled: the guest hints at them",
        "40 %",
        "old copy     1 000 pages (3.91 MiB) of 1 200, 93.0 s old",
        "checkpoint   4.77 MiB, /old/vm.ram",
    ):
        assert expected in text


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (10, 10), (11, 9), (200, 9)])
def test_long_lists_of_rounds_keep_their_ends(count: int, shown: int) -> None:
    rounds = sample_report(count).rounds
    kept = shortened(rounds)
    assert sum(item is not None for item in kept) == shown
    assert kept.count(None) == (count > 10)
    if count > 10:
        assert [item.n if item else None for item in kept] == [
            0, 1, 2, 3, None, *range(count - 5, count)
        ]  # fmt: skip
        assert f"  … {count - 9} more rounds, all in --report" in summary_lines(
            sample_report(count)
        )


@pytest.mark.parametrize(
    ("guest_on", "state", "text"),
    [
        (GuestOn.SOURCE, "running", "the guest runs on the source"),
        (GuestOn.DESTINATION, "running", "the guest runs on the destination"),
        (GuestOn.SOURCE, None, "the guest is on the source"),
        (GuestOn.DESTINATION, "paused", "on the destination, not running: QEMU says 'paused'"),
        (GuestOn.NEITHER, None, "NEITHER side.*if the source QEMU still lives, 'cont'"),
        (GuestOn.UNKNOWN, None, "UNKNOWN where the guest runs: start it nowhere before"),
        (GuestOn.HANDED_OVER, None, "handed over: whoever owns both monitors"),
    ],
)
def test_the_last_line_never_says_more_than_is_known(
    guest_on: GuestOn, state: str | None, text: str
) -> None:
    line = guest_line(guest_on, state)
    assert "\n" not in line
    assert re.search(text, line)


def test_shares_have_a_digit_more_where_they_are_small() -> None:
    assert [share_text(1, 3), share_text(1, 30), share_text(0, 3), share_text(0, 0)] == [
        "33 %", "3.3 %", "0.0 %", "-"
    ]  # fmt: skip
