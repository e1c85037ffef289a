"""The page: well-formed, self-contained, escaped, and complete."""

import re
from html.parser import HTMLParser

import pytest

from migrate.errors import MigrationError
from migrate.report.html import report_html
from migrate.report.report import ReportBuilder
from migrate.report.svg import Segment, column_chart, segment_bar
from tests.unit.report_sample import sample_report


class Checker(HTMLParser):
    """Collects tags and text, and fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_holds_the_figures_of_the_report() -> None:
    report = sample_report()
    report.free_page_hinting = False
    page = checked(report_html(report))
    for expected in (
        "Migration completed",
        "the guest runs on the destination",
        "1.78 s",
        "Downtime 176 ms",
        "last pages 96 ms",
        "262 410 pages",
        "device state",
        "round 1: 20 000",
        "free pages: the guest does not hint at them",
    ):
        assert expected in page.text
    assert page.tags.count("svg") == 4
    assert page.tags.count("table") == 2


def test_the_page_needs_nothing_else() -> None:
    page = report_html(sample_report())
    assert not re.search(r"<script|<link|<img|https?:|url\(|@import", page)


def test_a_migration_that_failed_early_still_has_a_page() -> None:
    report = ReportBuilder("source", 0).failed(10**9, MigrationError("no <route>"), None)
    page = checked(report_html(report))
    assert "no <route> [failed]" in page.text
    assert "svg" not in page.tags


def test_text_from_guests_and_peers_cannot_become_markup() -> None:
    report = sample_report()
    hostile = "<script>alert('x')</script>&\"'"
    report.warnings = [hostile]
    report.not_checked = [hostile]
    report.opaque_rest = report.qemu_version = report.started_utc = hostile
    report.guest_state = report.rounds[0].codec = hostile
    page = report_html(report)
    assert "<script" not in page
    assert checked(page).text.count(hostile) == 7


def test_columns_are_as_high_as_their_values() -> None:
    svg = column_chart("t", [(0, 10.0), (1, None), (2, 5.0)], lambda value: f"{value:.0f}")
    heights = [float(h) for h in re.findall(r'class="bar".*? height="([\d.]+)"', svg)]
    assert heights[0] == 2 * heights[1]
    assert len(heights) == 2


def test_many_rounds_do_not_write_over_each_other() -> None:
    svg = column_chart("t", [(n, 1.0) for n in range(500)], str)
    assert svg.count('text-anchor="middle"') <= 20


@pytest.mark.parametrize("values", [[], [(0, None)], [(0, 0.0)]])
def test_nothing_to_draw_draws_nothing(values: list[tuple[int, float | None]]) -> None:
    assert column_chart("t", values, str) == ""
    assert segment_bar([Segment("a", 0.0, "0")]) == ""


def test_segments_fill_the_bar() -> None:
    svg = segment_bar(
        [Segment("a", 1, "1 ms"), Segment("b", 0, "0 ms"), Segment("c", 2, "2 ms")]
    )
    widths = [float(w) for w in re.findall(r'<rect x="[\d.]+" y="0" width="([\d.]+)"', svg)]
    assert widths == [300.0, 0.0, 600.0]
    assert "c 2 ms" in svg
