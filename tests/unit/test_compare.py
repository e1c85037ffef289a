"""Statistics and tables of ``migrate-lab compare``, its plan, and the file of its results."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.cli import lab
from migrate.errors import ParamsError
from migrate.lab.compare_command import plan_from
from migrate.lab.compare_plan import WARM_UP, Cell, Plan, Step
from migrate.lab.compare_results import DONE, FAILED, NOT_CONVERGED, Results, Run
from migrate.lab.compare_table import (
    Summary,
    Table,
    failures,
    figures_table,
    has_failed,
    memory_table,
    ratios_table,
    summarize,
)
from migrate.lab.engine import EngineMode
from migrate.lab.measured import Measurement
from migrate.lab.native import NATIVE_MODES

ALL_OFF = {"return-path": True, "events": True, "multifd": False, "xbzrle": False}
CELL = Cell("7.2", "idle", "1gbit", "prealloc")


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
        peak_bytes=2 << 30,
        source_peak_bytes=80 << 20,
        destination_peak_bytes=0,
        data_pages=256 * 600,
        writes_per_s=19_990.0,
    )


def run(
    mode: str, repeat: int, total_ms: float | None, sent_mb: int = 500, *, cell: Cell = CELL
) -> Run:
    if total_ms is None:
        return Run(cell, mode, repeat, FAILED, 1.0, error="guest: it broke")
    return Run(cell, mode, repeat, DONE, 1.0, figures=measurement(total_ms, sent_mb * 10**6))


def diverged(mode: str, repeat: int) -> Run:
    return Run(CELL, mode, repeat, NOT_CONVERGED, 1.0, error="not finished within 120 s")


def value(table: Table, row: tuple[str, ...], header: str) -> str:
    return row[table.headers.index(header)]


def plan(*words: str) -> Plan:
    return plan_from(lab.build_parser().parse_args(["compare", *words]))


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


def test_figures_are_medians_of_the_runs_that_arrived() -> None:
    table = figures_table([run("plain", 1, 6000), run("plain", 2, None), run("plain", 3, 8000)])
    (row,) = table.rows
    assert row[:6] == (*CELL, "plain", "2/3")
    assert value(table, row, "total s") == "7.00 (6.00-8.00)"
    assert value(table, row, "MB on the link") == "500.0 (500.0-500.0)"


def test_a_mode_that_never_arrived_has_a_row_without_figures() -> None:
    table = figures_table([run("plain", 1, None)])
    (row,) = table.rows
    assert row[5] == "0/1"
    assert set(row[6:]) == {"-"}


def test_a_mode_that_did_not_converge_says_so_where_its_time_would_stand() -> None:
    table = figures_table([diverged("plain", 1), diverged("plain", 2)])
    assert value(table, table.rows[0], "total s") == NOT_CONVERGED
    table = figures_table([diverged("plain", 1), run("plain", 2, 9000)])
    assert value(table, table.rows[0], "total s") == "9.00"
    assert value(table, table.rows[0], "done") == "1/2"


def test_ratios_pair_the_runs_of_a_repeat() -> None:
    # Unpaired, the medians (2000 and 4000) would give 2.0.
    runs = [
        *(run("plain", 1, 1000), run("engine", 1, 500)),
        *(run("plain", 2, 2000), run("engine", 2, 4000)),
        *(run("plain", 3, 8000), run("engine", 3, 6000)),
    ]
    table = ratios_table(runs, {"engine"})
    (row,) = table.rows
    assert row[:6] == (*CELL, "engine", "plain")
    assert value(table, row, "total") == "0.75 (0.50-2.00)"


def test_the_best_native_mode_is_that_of_the_cell_and_of_the_figure() -> None:
    other = CELL._replace(link="200mbit")
    runs = [
        *(run("plain", 1, 1000, 700), run("multifd-zstd", 1, 2000, 300)),
        run("engine", 1, 500, 600),
        *(
            run("plain", 1, 9000, 700, cell=other),
            run("multifd-zstd", 1, 4000, 300, cell=other),
        ),
        run("engine", 1, 2000, 150, cell=other),
    ]
    table = ratios_table(runs, {"engine"})
    fast, slow = table.rows
    assert [value(table, row, "best native") for row in (fast, slow)] == [
        "plain",
        "multifd-zstd",
    ]
    assert [value(table, row, "total") for row in (fast, slow)] == ["0.50", "0.50"]
    assert value(table, fast, "MB") == "0.86"
    assert value(table, fast, "fewest bytes") == "multifd-zstd"
    assert value(table, fast, "MB / fewest") == "2.00"


def test_a_mode_that_mostly_did_not_arrive_is_not_the_best() -> None:
    runs = [
        *(run("plain", 1, 100), diverged("plain", 2), diverged("plain", 3)),
        *(run("xbzrle", repeat, 2000) for repeat in (1, 2, 3)),
        *(run("engine", repeat, 1000) for repeat in (1, 2, 3)),
    ]
    table = ratios_table(runs, {"engine"})
    assert value(table, table.rows[0], "best native") == "xbzrle"
    assert value(table, table.rows[0], "total") == "0.50 (0.50-0.50)"


def test_where_no_native_mode_arrived_there_is_no_ratio() -> None:
    table = ratios_table([diverged("plain", 1), run("engine", 1, 1000)], {"engine"})
    (row,) = table.rows
    assert value(table, row, "best native") == "none"
    assert value(table, row, "total") == "-"


def test_a_repeat_with_a_failure_gives_no_ratio() -> None:
    runs = [
        *(run("plain", 1, 1000), run("engine", 1, None)),
        *(run("plain", 2, 1000), run("engine", 2, 250)),
        *(run("plain", 3, None), run("engine", 3, 100)),
    ]
    table = ratios_table(runs, {"engine"})
    assert value(table, table.rows[0], "total") == "0.25"


def test_every_engine_variant_has_its_ratios() -> None:
    runs = [run("plain", 1, 1000), run("engine", 1, 500), run("lz4", 1, 250)]
    table = ratios_table(runs, {"engine", "lz4"})
    assert [(row[4], value(table, row, "total")) for row in table.rows] == [
        ("engine", "0.50"),
        ("lz4", "0.25"),
    ]


def test_memory_beside_what_the_guest_uses() -> None:
    table = memory_table([run("engine", 1, 1000)])
    (row,) = table.rows
    assert value(table, row, "sent by QEMU, MiB") == "600"
    assert value(table, row, "migrate-src MiB") == "80"
    assert value(table, row, "migrate-dst MiB") == "-"


def test_rows_come_in_the_order_of_the_first_runs() -> None:
    cells = [CELL._replace(link=link) for link in ("unshaped", "10gbit")]
    runs = [
        run(mode, repeat, 1000, cell=cell)
        for cell in cells
        for repeat, modes in ((1, ("plain", "engine")), (2, ("engine", "plain")))
        for mode in modes
    ]
    assert [(row[2], row[4]) for row in figures_table(runs).rows] == [
        ("unshaped", "plain"),
        ("unshaped", "engine"),
        ("10gbit", "plain"),
        ("10gbit", "engine"),
    ]


def test_text_and_markdown_hold_the_same_cells() -> None:
    table = figures_table([run("plain", 1, 6000), run("engine", 1, 3000)])
    markdown = table.markdown().splitlines()
    assert [cell.strip() for cell in markdown[0].strip("|").split("|")] == list(table.headers)
    assert markdown[1].startswith("| --- | --- | --- | --- | --- | --- | ---: |")
    assert len(markdown) == 4
    for line, row in zip(table.text().splitlines()[1:], table.rows, strict=True):
        assert line.split() == list(row)


def test_failures_name_the_run_and_the_reason() -> None:
    runs = [run("plain", 1, 1000), run("engine", 2, None), diverged("plain", 3)]
    assert failures(runs) == [
        "7.2/idle/1gbit/prealloc, engine, repeat 2: failed: guest: it broke",
        "7.2/idle/1gbit/prealloc, plain, repeat 3: did not converge: not finished within 120 s",
    ]
    assert has_failed(runs)
    assert not has_failed([runs[0], runs[2]])


def test_warm_up_is_in_no_table() -> None:
    runs = [run("plain", 0, 9000), run("plain", 1, 1000), run("engine", 1, 500)]
    assert figures_table(runs) == figures_table(runs[1:])
    assert ratios_table(runs, {"engine"}) == ratios_table(runs[1:], {"engine"})


# --- the plan -------------------------------------------------------------------------------------


def test_each_repeat_starts_with_the_next_mode() -> None:
    made = plan("--guests", "idle", "--links", "1gbit", "--modes", "plain,xbzrle,engine")
    assert [(step.repeat, step.mode) for step in made.steps(made.cells[0])] == [
        *((1, "plain"), (1, "xbzrle"), (1, "engine")),
        *((2, "xbzrle"), (2, "engine"), (2, "plain")),
        *((3, "engine"), (3, "plain"), (3, "xbzrle")),
    ]
    assert made.run_count == 9
    assert all(made.has(step) for step in made.steps(made.cells[0]))
    assert not made.has(Step(made.cells[0], "plain", WARM_UP))
    assert not made.has(Step(CELL._replace(link="200mbit"), "plain", 1))


def test_cells_are_chosen_by_pattern_and_grouped_by_what_one_source_serves() -> None:
    made = plan(
        *("--qemu", "7.2,10.0", "--guests", "idle,hot", "--links", "1gbit,unshaped"),
        *("--memory", "prealloc,lazy", "--cells", "7.2/*/*/prealloc,*/idle/unshaped/lazy"),
    )
    assert [(qemu, guest, len(cells)) for qemu, guest, cells in made.hosts()] == [
        ("7.2", "idle", 3),
        ("7.2", "hot", 2),
        ("10.0", "idle", 1),
    ]
    assert str(made.cells[-1]) == "10.0/idle/unshaped/lazy"


@pytest.mark.parametrize("words", [(), ("--ram", "2GiB")])
def test_ram_sizes_at_which_qemu_7_loses_dirty_pages_are_avoided(
    words: tuple[str, ...],
) -> None:
    made = plan(*words, "--guests", "idle,hot,rewrite,random,half,grow-1,grow-2,grow-4,grow-8")
    assert all(kind.ram_kib % 256 for kind in made.guests.values())


def test_a_guest_can_be_made_smaller() -> None:
    made = plan("--guests", "hot,random", "--content", "16MiB", "--working-set", "4MiB")
    hot, random = (made.guests[name].workload for name in ("hot", "random"))
    assert (hot.device_mib, hot.static_mib, hot.wws_mib) == (16, 0, 4)
    assert (random.device_mib, random.static_mib, random.wws_mib) == (0, 16, 4)


def test_variants_of_the_engine_add_to_what_all_have() -> None:
    made = plan(
        *("--engine-options", "--cache 0", "--dst-options", "--cache-max 1MiB"),
        *("--engine", "none=--compress none // --allow-inconsistent-rings"),
        *("--engine", "old@/opt/old=", "--modes", "plain,engine,none,old"),
    )
    source, destination = ("--cache", "0"), ("--cache-max", "1MiB")
    assert made.engines == {
        "engine": EngineMode(source, destination),
        "none": EngineMode(
            (*source, "--compress", "none"), (*destination, "--allow-inconsistent-rings")
        ),
        "old": EngineMode(source, destination, Path("/opt/old")),
    }


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--modes", "plain,postcopy"), "expected mode"),
        (("--memory", "huge"), "expected memory"),
        (("--guests", "busy"), "expected guest"),
        (("--qemu", "6.0"), "expected QEMU"),
        (("--links", "1 furlong"), "not a rate"),
        (("--repeats", "0"), "at least 1 repeat"),
        (("--cells", "*/fast"), "no cell"),
        (("--engine", "fast"), "NAME=OPTIONS"),
        (("--engine", "plain=--cache 0"), "a mode already"),
        (("--timeout", "soon"), "not a time"),
    ],
)
def test_impossible_options_are_refused(
    words: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        lab.main(["compare", *words])
    assert exit_info.value.code == ParamsError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


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
    assert zstd == plain | {
        "multifd-channels": 2,
        "multifd-compression": "zstd",
        "multifd-zstd-level": 1,
    }
    assert NATIVE_MODES["multifd"].parameters(300) == plain | {"multifd-channels": 2}
    cache = NATIVE_MODES["xbzrle"].parameters(300)
    assert cache == plain | {"xbzrle-cache-size": 128 << 20}


# --- the file -------------------------------------------------------------------------------------


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    results = Results({"cpus": 2}, path)
    results.begin(
        plan("--guests", "idle", "--engine", "old@/opt/old=", "--modes", "engine,old")
    )
    results.links_mbit_per_s["1gbit"] = 950.0
    for made in (run("plain", 0, 1000), run("plain", 1, 1000), diverged("engine", 1)):
        results.add(made)
    again = Results.load(path)
    assert again.runs == results.runs
    assert again.machine == {"cpus": 2}
    assert again.plans == json.loads(json.dumps(results.plans))
    assert again.links_mbit_per_s == {"1gbit": 950.0}


def test_only_what_failed_is_made_again(tmp_path: Path) -> None:
    results = Results({}, tmp_path / "raw.json")
    for made in (run("plain", 1, 1000), run("plain", 2, None), diverged("plain", 3)):
        results.add(made)
    steps = [Step(CELL, "plain", repeat) for repeat in (1, 2, 3, 4)]
    assert [results.is_settled(step) for step in steps] == [True, False, True, False]
    assert results.divergences(steps[0]) == 1
    results.add(run("plain", 2, 2000))
    assert [(made.repeat, made.outcome) for made in results.runs if made.repeat == 2] == [
        (2, DONE)
    ]
    assert len(Results.load(tmp_path / "raw.json").runs) == 3


def test_runs_of_two_machines_do_not_mix(tmp_path: Path) -> None:
    here = {"cpus": 2, "qemu": ["7.2.22"], "file_content_xxh3": None}
    results = Results(dict(here), tmp_path / "raw.json")
    results.check_machine({"cpus": 2, "qemu": ["10.0.2"], "file_content_xxh3": "12ab"})
    assert results.machine == {
        "cpus": 2,
        "qemu": ["7.2.22", "10.0.2"],
        "file_content_xxh3": "12ab",
    }
    results.check_machine(here)
    with pytest.raises(ParamsError, match="another machine: cpus 2, here 4"):
        results.check_machine({"cpus": 4})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "no result"),
        ('{"schema": 1}', "expected schema 2"),
        ('{"schema": 2, "machine": {}}', "no result"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "raw.json"
    path.write_text(content)
    with pytest.raises(ParamsError, match=complaint):
        Results.load(path)
    with pytest.raises(ParamsError, match="cannot read"):
        Results.load(tmp_path / "missing")


def test_a_file_with_results_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "raw.json"
    path.write_text("{}")
    with pytest.raises(SystemExit) as exit_info:
        lab.main(["compare", "--json", str(path)])
    assert exit_info.value.code == ParamsError.exit_code
    assert "raw.json exists: give --resume" in capsys.readouterr().err
    assert path.read_text() == "{}"


def test_tables_can_be_printed_again_from_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "raw.json"
    results = Results({"cpus": 2, "qemu": ["7.2.22"]}, path)
    results.add(run("plain", 1, 4000))
    results.add(run("fast", 1, 1000))
    with pytest.raises(SystemExit) as exit_info:
        lab.main(["compare", "--json", str(path), "--show", "--markdown"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "| 7.2 | idle | 1gbit | prealloc | fast | plain | 0.25 |" in printed
    assert "qemu: 7.2.22" in printed
    assert "load average before the runs: 1.0" in printed
    assert json.loads(path.read_text())["runs"][0]["cell"] == CELL._asdict()
