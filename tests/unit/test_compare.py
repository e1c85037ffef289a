"""Statistics and tables of the comparison, and the plan that the options make."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.lab.compare import NATIVE_MODES, Plan
from migrate.lab.compare_command import build_parser, plan_from
from migrate.lab.compare_table import (
    Run,
    Summary,
    failures,
    figures_table,
    ratios_table,
    summarize,
)
from migrate.lab.measured import Measurement

ALL_OFF = {"return-path": True, "events": True, "multifd": False, "xbzrle": False}


def measurement(total_ms: float, sent_bytes: int = 500_000_000) -> Measurement:
    return Measurement(
        total_ms=total_ms,
        wall_ms=total_ms + 400,
        downtime_events_ms=total_ms / 10,
        downtime_qemu_ms=100,
        downtime_heartbeat_ms=total_ms / 10 + 5,
        sent_bytes=sent_bytes,
        returned_bytes=1000,
        cpu_s=2.5,
        start_cpu_s=0.3,
    )


def run(mode: str, repeat: int, total_ms: float | None, *, link: str = "1gbit") -> Run:
    if total_ms is None:
        return Run(link, "lazy", mode, repeat, 1.0, error="guest: it broke")
    return Run(link, "lazy", mode, repeat, 1.0, figures=measurement(total_ms))


def cell(table_headers: tuple[str, ...], row: tuple[str, ...], header: str) -> str:
    return row[table_headers.index(header)]


def plan(*words: str) -> Plan:
    return plan_from(build_parser().parse_args(words))


def test_summary_of_known_values() -> None:
    assert summarize([3.0, 1.0, 2.0]) == Summary(median=2.0, low=1.0, high=3.0, count=3)
    assert summarize([4.0, 1.0]) == Summary(median=2.5, low=1.0, high=4.0, count=2)


def test_summary_leaves_out_what_is_missing() -> None:
    assert summarize([None, 7.0, None]) == Summary(7.0, 7.0, 7.0, 1)
    assert summarize([None]) is None
    assert summarize([]) is None


@given(st.lists(st.floats(min_value=0, max_value=1e9), min_size=1, max_size=20))
def test_median_lies_in_the_range_with_half_of_the_values_on_each_side(
    values: list[float],
) -> None:
    summary = summarize(values)
    assert summary is not None
    assert summary.low == min(values) <= summary.median <= summary.high == max(values)
    assert 2 * sum(value <= summary.median for value in values) >= len(values)
    assert 2 * sum(value >= summary.median for value in values) >= len(values)


def test_summary_prints_a_range_only_where_there_is_one() -> None:
    assert Summary(2.0, 1.0, 3.5, 3).text(1) == "2.0 (1.0-3.5)"
    assert Summary(2.0, 2.0, 2.0, 1).text(2) == "2.00"


def test_figures_are_medians_of_the_runs_that_succeeded() -> None:
    table = figures_table([run("plain", 1, 6000), run("plain", 2, None), run("plain", 3, 8000)])
    (row,) = table.rows
    assert row[:4] == ("1gbit", "lazy", "plain", "2/3")
    assert cell(table.headers, row, "total s") == "7.00 (6.00-8.00)"
    assert cell(table.headers, row, "MB on the link") == "500.0 (500.0-500.0)"


def test_a_mode_that_never_succeeded_has_a_row_without_figures() -> None:
    table = figures_table([run("plain", 1, None)])
    (row,) = table.rows
    assert row[3] == "0/1"
    assert set(row[4:]) == {"-"}


def test_ratios_pair_the_runs_of_a_repeat() -> None:
    # Unpaired, the medians (2000 and 4000) would give 2.0.
    runs = [
        *(run("plain", 1, 1000), run("engine", 1, 500)),
        *(run("plain", 2, 2000), run("engine", 2, 4000)),
        *(run("plain", 3, 8000), run("engine", 3, 6000)),
    ]
    table = ratios_table(runs)
    (row,) = table.rows
    assert row[:3] == ("1gbit", "lazy", "engine / plain")
    assert cell(table.headers, row, "total") == "0.75 (0.50-2.00)"


def test_a_repeat_with_a_failure_gives_no_ratio() -> None:
    runs = [
        *(run("plain", 1, 1000), run("engine", 1, None)),
        *(run("plain", 2, None), run("engine", 2, 100)),
        *(run("plain", 3, 1000), run("engine", 3, 250)),
    ]
    table = ratios_table(runs)
    assert cell(table.headers, table.rows[0], "total") == "0.25"


def test_ratios_never_mix_links() -> None:
    runs = [run("plain", 1, 1000, link="1gbit"), run("engine", 1, 500, link="200mbit")]
    table = ratios_table(runs)
    (row,) = table.rows
    assert row[0] == "200mbit"
    assert set(row[3:]) == {"-"}


def test_rows_come_in_the_order_of_the_first_runs() -> None:
    runs = [
        run(mode, repeat, 1000, link=link)
        for link in ("unshaped", "10gbit")
        for repeat in (1, 2)
        for mode in ("plain", "engine")
    ]
    rows = figures_table(runs).rows
    assert [(row[0], row[2]) for row in rows] == [
        ("unshaped", "plain"),
        ("unshaped", "engine"),
        ("10gbit", "plain"),
        ("10gbit", "engine"),
    ]


def test_text_and_markdown_hold_the_same_cells() -> None:
    table = figures_table([run("plain", 1, 6000), run("engine", 1, 3000)])
    markdown = table.markdown().splitlines()
    assert [cell.strip() for cell in markdown[0].strip("|").split("|")] == list(table.headers)
    assert markdown[1].startswith("| --- | --- | --- | --- | ---: |")
    assert len(markdown) == 4
    for line, row in zip(table.text().splitlines()[1:], table.rows, strict=True):
        assert line.split() == list(row)


def test_failures_name_the_run_and_the_reason() -> None:
    runs = [run("plain", 1, 1000), run("engine", 2, None)]
    assert failures(runs) == ["1gbit, lazy, engine, repeat 2: guest: it broke"]


def test_warm_up_is_in_no_table() -> None:
    runs = [run("plain", 0, 9000), run("plain", 1, 1000), run("engine", 1, 500)]
    assert figures_table(runs) == figures_table(runs[1:])
    assert ratios_table(runs) == ratios_table(runs[1:])


def test_modes_alternate_within_a_repeat_after_one_warm_up() -> None:
    made = plan("--links", "unshaped,1gbit", "--modes", "plain,engine", "--repeats", "2")
    assert [(step.link, step.mode, step.repeat) for step in made.steps()] == [
        ("unshaped", "plain", 0),
        ("unshaped", "plain", 1),
        ("unshaped", "engine", 1),
        ("unshaped", "plain", 2),
        ("unshaped", "engine", 2),
        ("1gbit", "plain", 1),
        ("1gbit", "engine", 1),
        ("1gbit", "plain", 2),
        ("1gbit", "engine", 2),
    ]
    assert made.run_count == 9


def test_default_plan_avoids_the_ram_size_at_which_qemu_7_loses_dirty_pages() -> None:
    assert plan().ram_kib % 256 != 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--modes", "plain,postcopy"), "expected mode"),
        (("--memory", "huge"), "expected memory"),
        (("--links", "1 furlong"), "not a rate"),
        (("--repeats", "0"), "at least 1 repeat"),
    ],
)
def test_impossible_options_are_refused(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        plan(*words)


@pytest.mark.parametrize(
    ("mode", "changed"),
    [
        ("plain", {}),
        ("multifd", {"multifd": True}),
        ("multifd-zstd", {"multifd": True}),
        ("xbzrle", {"xbzrle": True}),
    ],
)
def test_native_modes_state_every_capability(mode: str, changed: dict[str, bool]) -> None:
    assert NATIVE_MODES[mode].capabilities() == ALL_OFF | changed


def test_native_modes_differ_only_in_what_they_are_named_after() -> None:
    plain = NATIVE_MODES["plain"].parameters(300)
    assert plain["downtime-limit"] == 300
    zstd = NATIVE_MODES["multifd-zstd"].parameters(300)
    assert zstd == plain | {"multifd-channels": 2, "multifd-compression": "zstd"}
    assert NATIVE_MODES["multifd"].parameters(300) == plain | {"multifd-channels": 2}
    cache = NATIVE_MODES["xbzrle"].parameters(300)
    assert cache == plain | {"xbzrle-cache-size": 64 << 20}
