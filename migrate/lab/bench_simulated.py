"""The command ``bench-simulated``: how fast simulated guests migrate, on both clocks.

``virtual``: many migrations in one process, some of them again in another process and order.
``loopback``: both commands as processes, the real clock, incompressible pages, no codec.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import trio

from migrate.errors import ParamsError
from migrate.lab.compare_table import Table, machine_lines
from migrate.lab.rig import level_memory
from migrate.lab.virtual import VirtualParams, run_virtual
from migrate.memory import keep_freed_memory
from migrate.report.report import report_json
from migrate.runtime import share_interpreter
from migrate.simulation.profile import load_profile
from migrate.transport.memory_link import MemoryLinkParams
from migrate.units import KIB, MIB

LINK: Final = MemoryLinkParams(bandwidth_bps=125_000_000, delay_ms=0.5)
"""Of the virtual runs: 1 Gbit/s."""

LISTEN_S: Final = 20.0
COMMAND_S: Final = 120.0
TCP_LISTEN: Final = "0A"
SETTLED_RUNS: Final = 10
"""After so many runs a process has reached the size that it keeps."""


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="bench-simulated",
        description="Measure migrations of simulated guests: on a virtual clock, in one process, "
        "and on the real clock over loopback, both commands as processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--clocks", default="virtual,loopback", help="of virtual, loopback")
    add("--profiles", default="idle", help="guests of the virtual runs")
    add("--runs", type=int, default=500, metavar="N", help="virtual runs of each profile")
    add("--again", type=int, default=50, metavar="N", help="of these, in another process")
    add("--repeats", type=int, default=5, metavar="N", help="runs over loopback")
    add("--loopback-profile", default="incompressible", metavar="NAME", help="its guest")
    add("--links", default="plain", help="of plain, tls; in turns over loopback")
    add("--markdown", action="store_true", help="print the tables in Markdown")
    add("--print-digests", default="", metavar="SEEDS", help=argparse.SUPPRESS)
    return parser


def digest_of(profile: str, seed: int) -> str:
    """Migrate on the virtual clock; one hash over both reports.

    Raises:
        ParamsError: The migration failed.
    """
    reports = run_virtual(load_profile(profile), LINK, VirtualParams(), seed)
    for report in reports:
        if report.status != "completed":
            raise ParamsError(f"{profile}, seed {seed}: {report.status}, {report.error}")
    return hashlib.blake2b("".join(map(report_json, reports)).encode()).hexdigest()[:32]


# --- the virtual clock ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VirtualFigures:
    """One profile's runs.

    Attributes:
        wall_s: Of each run.
        cpu_s: Processor time of each run, all threads.
        settled_kib: Most memory that the process had taken after ``SETTLED_RUNS``.
        most_kib: And after all.
        repeated: Runs that another process repeated.
        equal: Of these, how many gave the same reports.
    """

    wall_s: list[float]
    cpu_s: list[float]
    settled_kib: int
    most_kib: int
    repeated: int
    equal: int


def measure_virtual(profile: str, runs: int, again: int) -> VirtualFigures:
    """Migrate ``runs`` guests one after the other, with seeds 0 and up."""
    wall_s, cpu_s, digests = [], [], []
    settled_kib = 0
    for seed in range(runs):
        before_s, cpu_before_s = time.monotonic(), time.process_time()
        digests.append(digest_of(profile, seed))
        wall_s.append(time.monotonic() - before_s)
        cpu_s.append(time.process_time() - cpu_before_s)
        if seed < SETTLED_RUNS:
            settled_kib = _most_kib()
    seeds = random.Random(runs).sample(range(runs), min(again, runs))
    there = _digests_elsewhere(profile, seeds) if seeds else []
    equal = sum(digests[seed] == digest for seed, digest in zip(seeds, there, strict=True))
    return VirtualFigures(wall_s, cpu_s, settled_kib, _most_kib(), len(seeds), equal)


def _most_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _digests_elsewhere(profile: str, seeds: Sequence[int]) -> list[str]:
    """Let another process, with other string hashes, do the same in another order."""
    done = subprocess.run(
        [
            sys.executable,
            sys.argv[0],
            f"--profiles={profile}",
            f"--print-digests={','.join(map(str, seeds))}",
        ],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        stdout=subprocess.PIPE,
        check=True,
    )
    digests: list[str] = json.loads(done.stdout)
    return digests


def virtual_table(figures: dict[str, VirtualFigures]) -> Table:
    """One row per profile."""
    headers = (
        "profile",
        "runs",
        "all s",
        "wall s per run",
        "CPU s per run",
        "peak MiB, after 10 and all runs",
        "repeated elsewhere with equal reports",
    )
    rows = [
        (
            profile,
            str(len(row.wall_s)),
            f"{sum(row.wall_s):.1f}",
            _cell(row.wall_s, 2),
            _cell(row.cpu_s, 2),
            f"{row.settled_kib // KIB}, {row.most_kib // KIB}",
            f"{row.equal}/{row.repeated}",
        )
        for profile, row in figures.items()
    ]
    return Table(headers, tuple(rows), left=1)


# --- the real clock -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoopbackFigures:
    """One migration, from the source's report and the processes' account.

    Attributes:
        total_ms: As migrate-src reports it, its set-up in it.
        setup_ms: Until pages began to flow.
        page_bytes: Content that travelled, raw.
        downtime_ms: As reported.
        cpu_s: Processor time of both commands, their start in it.
    """

    total_ms: float
    setup_ms: float
    page_bytes: int
    downtime_ms: float
    cpu_s: float

    @property
    def mb_per_s(self) -> float:
        """Megabytes (10^6) a second without the set-up."""
        return self.page_bytes / (self.total_ms - self.setup_ms) / 1e3

    @property
    def mb_per_s_with_setup(self) -> float:
        """Megabytes a second of the whole."""
        return self.page_bytes / self.total_ms / 1e3


BOTH_GUESTS_BYTES: Final = 3 << 30
"""A guest of 1 GiB at both ends, and what the commands need."""


def measure_loopback(profile: str, *, tls: bool = False) -> LoopbackFigures:
    """Migrate once.

    Args:
        profile: The guest.
        tls: Over a link with TLS.

    Raises:
        ParamsError: A command failed.
    """
    with tempfile.TemporaryDirectory(prefix="bench-simulated-") as name:
        workdir = Path(name)
        to = f"127.0.0.1:{_free_port()}"
        dst = ["--listen", to, "--simulate", "--run-for", "0ms", "--run-dir", name]
        src = ["--to", to, "--simulate", profile, "--compress", "none"]
        if tls:
            secured = ["--tls-dir", str(_certificates(workdir))]
            dst += secured
            src += secured
        trio.run(level_memory, BOTH_GUESTS_BYTES, BOTH_GUESTS_BYTES)
        cpu_before_s = _children_cpu_s()
        with _command("migrate-dst", dst, workdir) as receiver:
            _wait_listening(receiver, to)
            with _command("migrate-src", src, workdir) as sender:
                _check_ended("migrate-src", sender, workdir)
            _check_ended("migrate-dst", receiver, workdir)
        cpu_s = _children_cpu_s() - cpu_before_s
        report: dict[str, Any] = json.loads((workdir / "migrate-src.json").read_text("utf-8"))
    return LoopbackFigures(
        report["total_ms"],
        report["setup_ms"],
        report["page_bytes"],
        report["downtime_ms"],
        cpu_s,
    )


def measure_links(options: argparse.Namespace) -> dict[str, list[LoopbackFigures]]:
    """Migrate over each kind of link in turns, so that the machine's moods meet all of them."""
    links, profile = options.links.split(","), options.loopback_profile
    measured: dict[str, list[LoopbackFigures]] = {f"{profile}, {link}": [] for link in links}
    for _ in range(options.repeats):
        for link in links:
            figures = measure_loopback(profile, tls=link == "tls")
            measured[f"{profile}, {link}"].append(figures)
    return measured


def _certificates(workdir: Path) -> Path:
    from migrate.lab.host_certificates import initialise  # noqa: PLC0415 - needs an extra

    (folder,) = initialise(workdir / "pki", [["127.0.0.1"]], days=1)
    return folder


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def _command(
    name: str, options: Sequence[str], workdir: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of the engine's commands; it has ended when the block has."""
    module = f"migrate.cli.{name.removeprefix('migrate-')}"
    common = ["--quiet", "--state-dir", str(workdir), "--report", str(workdir / f"{name}.json")]
    with (workdir / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _CALL.format(module), *options, *common],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


_CALL: Final = "import sys, {0}; sys.exit({0}.main())"


def _wait_listening(process: subprocess.Popen[bytes], address: str) -> None:
    """Wait until migrate-dst listens; not by connecting, which would be the migration's turn."""
    wanted = f":{int(address.rpartition(':')[2]):04X}"
    until_s = time.monotonic() + LISTEN_S
    while process.poll() is None and time.monotonic() < until_s:
        rows = Path(f"/proc/{process.pid}/net/tcp").read_text("utf-8").splitlines()[1:]
        columns = [row.split() for row in rows]
        if any(row[1].endswith(wanted) and row[3] == TCP_LISTEN for row in columns):
            return
        time.sleep(0.02)
    raise ParamsError(f"migrate-dst does not listen on {address}")


def _check_ended(name: str, process: subprocess.Popen[bytes], workdir: Path) -> None:
    if process.wait(COMMAND_S):
        words = (workdir / f"{name}.log").read_text("utf-8", errors="replace")[-300:]
        raise ParamsError(f"{name} exited with {process.returncode}: {words.strip()}")


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def loopback_table(measured: Mapping[str, Sequence[LoopbackFigures]]) -> Table:
    """One row for each kind of run."""
    headers = (
        "profile, link",
        "runs",
        "MB/s",
        "MB/s with set-up",
        "total ms",
        "set-up ms",
        "downtime ms",
        "CPU s, both commands",
    )
    rows = [
        (
            name,
            str(len(runs)),
            _cell([run.mb_per_s for run in runs], 0),
            _cell([run.mb_per_s_with_setup for run in runs], 0),
            _cell([run.total_ms for run in runs], 0),
            _cell([run.setup_ms for run in runs], 0),
            _cell([run.downtime_ms for run in runs], 0),
            _cell([run.cpu_s for run in runs], 2),
        )
        for name, runs in measured.items()
    ]
    return Table(headers, tuple(rows), left=1)


# --- the command ----------------------------------------------------------------------------------


def _cell(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def machine_facts() -> dict[str, Any]:
    """What a reader of the numbers must know of this machine."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": os.cpu_count(),
        "ram_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``bench-simulated``; 1 when a migration failed or did not repeat."""
    parser = build_parser()
    options = parser.parse_args(argv)
    keep_freed_memory()
    share_interpreter()
    if options.print_digests:
        seeds = map(int, options.print_digests.split(","))
        json.dump([digest_of(options.profiles, seed) for seed in seeds], sys.stdout)
        return 0
    if options.runs < 1 or options.repeats < 1:
        parser.error("expected at least 1 run")
    machine = "; ".join(machine_lines(machine_facts()))
    clocks = options.clocks.split(",")
    tables, equal = [], True
    try:
        if "loopback" in clocks:
            tables.append(loopback_table(measure_links(options)))
        if "virtual" in clocks:
            rows = {
                name: measure_virtual(name, options.runs, options.again)
                for name in options.profiles.split(",")
            }
            equal = all(row.equal == row.repeated for row in rows.values())
            tables.append(virtual_table(rows))
    except (ParamsError, subprocess.SubprocessError) as error:
        parser.exit(1, f"bench-simulated: {error}\n")
    for table in tables:
        print(table.markdown() if options.markdown else table.text(), end="\n\n")
    print(machine)
    return 0 if equal else 1
