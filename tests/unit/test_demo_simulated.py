"""The proof of the demo without QEMU: it says "ok" only of what both commands show."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from migrate.lab.demo_simulated import (
    MISTAKES,
    describe,
    read_counts,
    report_facts,
    report_option,
    request_facts,
)
from migrate.lab.demo_stage import Fact, judge
from migrate.simulation.profile import load_profile

PROFILE = """
description = "All kinds of devices"
ram = "8MiB"
[[vcpus]]
rate = 500
working_set = "512KiB"
[[devices]]
kind = "virtio-net"
area = "512KiB"
rate_per_s = 200.0
[[devices]]
kind = "virtio-blk"
area = "1MiB"
think_us = 2000.0
[[devices]]
kind = "virtio-balloon"
area = "64KiB"
[[devices]]
kind = "virtio-console"
area = "256KiB"
[[devices]]
kind = "nic"
area = "512KiB"
rate_per_s = 200.0
[[devices]]
kind = "disk"
area = "1MiB"
think_us = 2000.0
"""

NET = {"requests_sent": 1200, "requests_completed": 1200, "requests_outstanding": 0, "stray": 0}
CONSOLE = {"lines_written": 9, "lines_seen": 9, "lines_typed": 3, "lines_got": 3}


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "migrate.lab.demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def side(role: str) -> dict[str, Any]:
    queue = {"index": 0, "consistent": True}
    return {
        "role": role,
        "guest_on": "destination",
        "guest_state": "running",
        "integrity": {
            "equal": True,
            "pages": 2048,
            "source_digest": "ab",
            "destination_digest": "ab",
        },
        "devices": [{"name": "virtio-net.0", "virtqueues": [queue, queue]}],
        "service": {
            "before": {"lost": 0},
            "rounds": {"0": {"lost": 0}},
            "downtime": {"lost": 0},
            "downtime_gap_ms": 90.0,
            "after": {"completed": 50, "lost": 0},
        },
        "downtime_ms": 80.0,
        "guest_clock_jump_ms": 78.0,
    }


def named(facts: list[Fact]) -> dict[str, Fact]:
    return {fact.name: fact for fact in facts}


def test_a_guest_with_every_kind_of_device_arrives_whole(tmp_path: Path) -> None:
    profile, report = tmp_path / "all.toml", tmp_path / "report.json"
    profile.write_text(PROFILE, encoding="utf-8")
    done = run_demo("--simulate", str(profile), "--report", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The guest arrived whole" in done.stdout
    assert "FAILED" not in done.stdout
    for name in ("virtio-net.0", "virtio-blk.1", "nic.4", "disk.5", "memory", "rings", "clock"):
        assert f"ok      {name} " in done.stdout
    assert json.loads(report.read_bytes())["guest_on"] == "destination"


def test_a_profile_that_is_none_is_refused_in_one_line() -> None:
    done = run_demo("--simulate", "nope")
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no profile 'nope'" in done.stdout


def test_what_holds_is_good() -> None:
    facts = [*request_facts({"virtio-net.0": NET, "console": CONSOLE})]
    facts += report_facts(side("source"), side("destination"), served=True)
    assert [fact.name for fact in facts if not fact.good] == []
    assert named(facts)["virtio-net.0"].text == "1 200 requests, 1 200 answered, 0 wrong"


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests_completed": 1199},
        {"requests_completed": 1201},
        {"requests_outstanding": 1},
        {"lines_written": 2, "lines_seen": 1},
        {"lines_typed": 1, "lines_got": 2},
        *({name: 1} for name in MISTAKES),
    ],
)
def test_a_request_that_is_lost_repeated_or_damaged_is_told(wrong: dict[str, int]) -> None:
    (fact,) = request_facts({"device": {**NET, **wrong}})
    assert not fact.good


@pytest.mark.parametrize("at_source", [True, False])
@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("memory", ("integrity", "equal"), None),
        ("memory", ("integrity", "equal"), False),
        ("memory", ("integrity", "destination_digest"), "cd"),
        ("rings", ("devices", 0, "virtqueues", 1), {"consistent": False}),
        ("rings", ("devices", 0, "virtqueues", 1), {"consistent": None}),
        ("rings", ("devices",), []),
        ("guest", ("guest_on",), "unknown"),
        ("guest", ("guest_state",), "paused"),
    ],
)
def test_what_one_side_denies_does_not_hold(
    at_source: bool, name: str, path: tuple[Any, ...], value: object
) -> None:
    reports = [deepcopy(side("source")), deepcopy(side("destination"))]
    place: Any = reports[0 if at_source else 1]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    facts = named(list(report_facts(*reports, served=True)))
    assert [key for key, fact in facts.items() if not fact.good] == [name]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("service", "service", None),
        ("service", "service", {**side("destination")["service"], "before": {"lost": 1}}),
        ("service", "service", {**side("destination")["service"], "after": {}}),
        ("clock", "guest_clock_jump_ms", None),
        ("clock", "guest_clock_jump_ms", -1.0),
    ],
)
def test_what_the_destination_saw_of_service_and_clock_counts(
    name: str, key: str, value: object
) -> None:
    facts = report_facts(side("source"), {**side("destination"), key: value}, served=True)
    assert not named(list(facts))[name].good


def test_a_guest_that_nobody_asks_has_no_service() -> None:
    lonely = {**side("destination"), "service": None}
    facts = named(list(report_facts(side("source"), lonely, served=False)))
    assert "service" not in facts
    assert all(fact.good for fact in facts.values())


def test_one_fact_that_fails_fails_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Fact("memory", True, "equal"), Fact("virtqueues", False, "not so")
    assert judge([good], "Done.") == 0
    assert judge([good, bad], "Done.") == 1
    assert "did NOT arrive whole" in capsys.readouterr().out


def test_counts_are_read_from_among_other_events(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    event = {"event": "simulated device", "device": "a", "kind": "nic", "counts": {"exits": 1}}
    trace.write_text(f'{{"event": "phase"}}\n{json.dumps(event)}\n', encoding="utf-8")
    assert read_counts(trace) == {"a": {"exits": 1}}


def test_the_users_own_report_is_found() -> None:
    assert report_option(["--html", "a", "--report", "b.json"]) == Path("b.json")
    assert report_option(["--report=b.json"]) == Path("b.json")
    assert report_option(["--max-bandwidth", "1Gbit"]) is None


def test_a_profile_is_described_in_a_line() -> None:
    text = describe(load_profile("web"))
    assert "'web'" in text
    assert "1.00 GiB" in text
    assert text.endswith("virtio-net, virtio-blk, virtio-console")
