"""The command ``compare``: its options, what it prints, and its exit status."""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from migrate.errors import MigrationError, ParamsError
from migrate.lab import guest_image, qemu_binaries
from migrate.lab.compare import (
    MEMORIES,
    MODES,
    Plan,
    Results,
    link_rate,
    machine_facts,
    run_plan,
)
from migrate.lab.compare_table import failures, figures_table, machine_lines, ratios_table
from migrate.lab.engine import EngineMode
from migrate.lab.guest_vm import Workload
from migrate.lab.qemu_binaries import QemuBinary
from migrate.session import most_telling
from migrate.units import KIB, MIB, NS_PER_MS, NS_PER_S, parse_duration_ns, parse_size

INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """Build the command line; every option has its unit in its value."""
    parser = argparse.ArgumentParser(
        prog="compare",
        description="Migrate one lab guest natively and through the engine, in turns, from one "
        "network namespace to another, and compare. Needs root.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--qemu", default="7.2", metavar="VERSION", help="both QEMUs: 7.2 or 10.0")
    add("--links", default="unshaped,1gbit,200mbit", help="unshaped, or rates such as 1gbit")
    add("--memory", default="lazy", help="lazy, prealloc: RAM of both QEMUs")
    add("--modes", default="plain,multifd-zstd,engine", help=f"of {','.join(MODES)}")
    add("--repeats", type=int, default=3, metavar="N", help="runs of each combination")
    add("--ram", default="1048584KiB", metavar="SIZE", help="guest RAM")
    add("--static", default="512MiB", metavar="SIZE", help="RAM filled once, half random")
    add("--working-set", default="16MiB", metavar="SIZE", help="RAM that the guest rewrites")
    add("--dirty-rate", type=int, default=0, metavar="PAGES", help="page writes per second")
    add("--downtime-limit", default="300ms", metavar="TIME", help="of QEMU and of the engine")
    add("--timeout", default="300s", metavar="TIME", help="longest time for one migration")
    add("--src-options", default="", metavar="WORDS", help="more options of migrate-src")
    add("--dst-options", default="", metavar="WORDS", help="more options of migrate-dst")
    add("--json", type=Path, metavar="FILE", help="write raw runs and machine facts")
    add("--markdown", action="store_true", help="print the tables in Markdown")
    return parser


def plan_from(options: argparse.Namespace) -> Plan:
    """Check the options and say what to do.

    Raises:
        ValueError: A value that cannot be.
    """
    workload = Workload(
        static_mib=parse_size(options.static) // MIB,
        half=100,
        random=0,
        text=0,
        zero=0,
        file=0,
        wws_mib=parse_size(options.working_set) // MIB,
        rate_pages_per_s=options.dirty_rate,
        check_pages_per_s=0,
    )
    plan = Plan(
        qemu=options.qemu,
        links=tuple(options.links.lower().split(",")),
        memories=tuple(options.memory.split(",")),
        modes=tuple(options.modes.split(",")),
        repeats=options.repeats,
        ram_kib=parse_size(options.ram) // KIB,
        workload=workload,
        downtime_limit_ms=parse_duration_ns(options.downtime_limit) // NS_PER_MS,
        timeout_s=parse_duration_ns(options.timeout) / NS_PER_S,
        engine=EngineMode(
            tuple(shlex.split(options.src_options)), tuple(shlex.split(options.dst_options))
        ),
    )
    for link in plan.links:
        link_rate(link)
    for kind, chosen, possible in (
        ("memory", plan.memories, MEMORIES),
        ("mode", plan.modes, MODES),
    ):
        if unknown := set(chosen) - set(possible):
            raise ValueError(f"expected {kind} of {', '.join(possible)}, got {min(unknown)!r}")
    if plan.repeats < 1:
        raise ValueError(f"expected at least 1 repeat, got {plan.repeats}")
    return plan


def find_qemu(version: str) -> QemuBinary:
    """Return a QEMU of this version: the machine's own, or 10.0, downloaded if missing.

    Raises:
        MigrationError: There is none.
    """
    if version == "10.0":
        return qemu_binaries.find_10_0(fetch=True)
    installed = qemu_binaries.find_installed()
    if installed.short_version != version:
        raise ParamsError(
            f"expected QEMU {version}, this machine has {installed.short_version}"
        )
    return installed


def print_tables(results: Results, *, markdown: bool) -> None:
    """Print medians, ranges, ratios and failures on stdout."""
    for table in (figures_table(results.runs), ratios_table(results.runs)):
        if table.rows:
            print(table.markdown() if markdown else table.text(), end="\n\n")
    for line in failures(results.runs):
        print(f"failed: {line}")
    facts = "; ".join(machine_lines(results.machine))
    speeds = ", ".join(f"{name} {mbit:.0f}" for name, mbit in results.links_mbit_per_s.items())
    print(f"{facts}; one TCP connection gets, in Mbit/s: {speeds}")


async def _run_until_signal(
    plan: Plan, binary: QemuBinary, results: Results, say: Callable[[str], None]
) -> bool:
    """Run the plan; ``False`` if a signal ended it, with everything cleaned up."""
    finished = False
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def cancel_on_signal() -> None:
                number = await anext(signals)
                say(f"{signal.Signals(number).name}: cleaning up")
                nursery.cancel_scope.cancel()

            nursery.start_soon(cancel_on_signal)
            await run_plan(plan, binary, results, say)
            finished = True
            nursery.cancel_scope.cancel()
    return finished


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``compare``; 0 when every run succeeded, 1 when some failed, 130 after a signal."""
    parser = build_parser()
    options = parser.parse_args(argv)
    started_s = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started_s:7.1f} s  {line}", file=sys.stderr, flush=True)

    try:
        plan = plan_from(options)
    except ValueError as error:
        parser.error(str(error))
    try:
        binary = find_qemu(plan.qemu)
        guest_image.build()
        results = Results(plan, machine_facts(binary), options.json)
        finished = trio.run(_run_until_signal, plan, binary, results, say)
    except (MigrationError, trio.TooSlowError, BaseExceptionGroup) as raised:
        told = most_telling(raised)
        parser.exit(told.exit_code, f"compare: {told}\n")
    print_tables(results, markdown=options.markdown)
    if not finished:
        return INTERRUPTED
    return 1 if failures(results.runs) else 0
