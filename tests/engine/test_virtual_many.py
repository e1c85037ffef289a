"""Many migrations of many guests in one process: none leaves a trace in the next.

``tools/bench-simulated`` does the same with hundreds of the shipped guests, and measures.
"""

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from migrate.lab.virtual import VirtualParams, run_virtual
from migrate.params import Compress
from migrate.report.report import report_json
from migrate.simulation.profile import read_profile
from migrate.transport.memory_link import MemoryLinkParams
from migrate.units import MIB

ROOT: Final = Path(__file__).resolve().parents[2]
TOOL: Final = ROOT / "tools" / "bench-simulated"

LINKS: Final = [
    MemoryLinkParams(bandwidth_bps=1_250_000_000, delay_ms=0.05),
    MemoryLinkParams(bandwidth_bps=125_000_000, delay_ms=0.5),
    MemoryLinkParams(bandwidth_bps=25_000_000, delay_ms=10),
]
PARAMS: Final = [
    VirtualParams(run_for_s=0.2),
    VirtualParams(run_for_s=0.2, compress=Compress("none")),
    VirtualParams(run_for_s=0.2, compress=Compress("zstd", 1), downtime_limit_ms=100),
    VirtualParams(run_for_s=0.2, compress=Compress("lz4"), cache_bytes=1 * MIB),
]

Table = dict[str, Any]

HOT: Final[Table] = {
    "rate": 4000,
    "working_set": "3MiB",
    "offset": "12MiB",
    "locality": "zipf",
    "bytes_per_write": 64,
}
BURSTS: Final[Table] = {
    "working_set": "4MiB",
    "offset": "11MiB",
    "content": "text",
    "phases": [
        {"duration": "60ms", "rate": 6000, "bytes_per_write": 256},
        {"duration": "40ms", "rate": 900, "locality": "sequential", "bytes_per_write": 4096},
    ],
}
NET: Final[Table] = {"kind": "virtio-net", "area": "2MiB", "rate_per_s": 800.0}
DISK: Final[Table] = {
    "kind": "virtio-blk",
    "area": "8MiB",
    "depth": 2,
    "think_us": 4000.0,
    "read_share": 0.5,
}
BALLOON: Final[Table] = {
    "kind": "virtio-balloon",
    "area": "256KiB",
    "first_page": 2560,
    "page_count": 200,
    "targets": [[20, 150], [150, 40]],
}

GUESTS: Final[dict[str, Table]] = {
    "still": {"content": {"random": 0.2, "text": 0.2, "half": 0.2}},
    "hot": {"content": {"text": 0.5, "repeated": 0.2}, "vcpus": [HOT], "devices": [NET]},
    "bursts": {"content": {"random": 0.3}, "vcpus": [HOT, BURSTS], "devices": [DISK]},
    "shrunk": {"content": {"half": 0.6}, "vcpus": [BURSTS], "devices": [BALLOON, NET]},
}

RUNS: Final = 40


def run(number: int) -> str:
    """One of the mix, by its number: guest, link, options and seed; a hash over both reports."""
    name = list(GUESTS)[number % 4]
    guest = read_profile({"name": name, "ram": "16MiB", "warm_up": "50ms", **GUESTS[name]})
    link, params = LINKS[number // 4 % 3], PARAMS[number // 12 % 4]
    reports = run_virtual(guest, link, params, seed=number)
    assert [report.status for report in reports] == ["completed", "completed"], number
    assert reports[0].integrity.equal, number
    return hashlib.blake2b("".join(map(report_json, reports)).encode()).hexdigest()


def print_runs() -> None:
    """What another process does: all of them, in another order."""
    numbers = list(range(RUNS))
    random.Random(1).shuffle(numbers)
    json.dump([(number, run(number)) for number in numbers], sys.stdout)


@pytest.mark.timeout(300)
def test_every_run_gives_its_reports_in_whichever_process_and_order() -> None:
    program = "from tests.engine.test_virtual_many import print_runs; print_runs()"
    there = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        stdout=subprocess.PIPE,
    )
    with there:
        here = [run(number) for number in range(RUNS)]
        printed, _ = there.communicate(timeout=240)
    assert there.returncode == 0
    assert len(set(here)) == RUNS
    assert dict(json.loads(printed)) == dict(enumerate(here))


def test_memory_does_not_grow_from_run_to_run() -> None:
    def resident_bytes() -> int:
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
        return pages * resource.getpagesize()

    for number in (0, 1, 2, 3):
        run(number)
    settled_bytes = resident_bytes()
    for number in (0, 1, 2, 3) * 4:
        run(number)
    # Each run that stays would be 16 MiB on either side and a page cache.
    assert resident_bytes() - settled_bytes < 32 * MIB


def test_tool_measures_a_few_runs_and_repeats_them() -> None:
    done = subprocess.run(
        [sys.executable, TOOL, "--clocks=virtual", "--runs=2", "--again=2", "--markdown"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    header, _, row, _, machine, *_ = done.stdout.splitlines()
    assert header.startswith("| profile | runs |")
    assert row.startswith("| idle | 2 |")
    assert row.endswith("| 2/2 |")
    assert "cpus: " in machine
