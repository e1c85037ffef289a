"""``migrate-lab compare``: its options, what it prints, and its exit status."""

import argparse
import shlex
from functools import partial
from pathlib import Path

from migrate.errors import ParamsError
from migrate.lab import file_content, guest_image
from migrate.lab.command_line import (
    INTERRUPTED,
    exit_status,
    find_qemu,
    run_until_signal,
    talking_clock,
)
from migrate.lab.compare import Comparison
from migrate.lab.compare_guests import GUESTS, add_sizes, resized
from migrate.lab.compare_plan import Choice, Plan, engine_modes
from migrate.lab.compare_results import Results, machine_facts
from migrate.lab.compare_table import (
    Table,
    failures,
    figures_table,
    has_failed,
    machine_lines,
    memory_table,
    ratios_table,
    summarize,
)
from migrate.lab.engine import EngineMode
from migrate.lab.native import NATIVE_MODES
from migrate.units import NS_PER_MS, NS_PER_S, parse_duration_ns

SUMMARY = "migrate guests natively and through the engine, in turns, and compare"
DESCRIPTION = """\
Migrate lab guests natively and through the engine, in turns, from one network
namespace to another, and print tables: medians and ranges, and the engine
divided by the best native mode of each cell. A cell is a QEMU version, a guest,
a link and the kind of the destination's memory. Needs root.
"""
EPILOG = "\n".join(
    [
        "guests:",
        *(f"  {name:9} {kind.summary}" for name, kind in GUESTS.items()),
        "",
        "Lists are separated by commas. An engine variant is, for example,",
        "  --engine 'lz4=--compress lz4' --modes plain,engine,lz4",
        "  --engine 'old@/opt/old/bin=' --modes engine,old",
        "and options of migrate-dst stand behind ' // '. See docs/performance.md.",
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; every one has its unit in its value."""
    add = parser.add_argument
    add("--qemu", default="7.2", metavar="LIST", help="7.2, 10.0 (default: 7.2)")
    add("--guests", default="idle,hot,rewrite,random", metavar="LIST", help="see below")
    add(
        "--links",
        default="200mbit,1gbit,10gbit,unshaped",
        metavar="LIST",
        help="rates, unshaped",
    )
    add(
        "--memory", default="prealloc", metavar="LIST", help="the destination's: prealloc, lazy"
    )
    add("--modes", default=",".join([*NATIVE_MODES, "engine"]), metavar="LIST",
        help=f"{', '.join(NATIVE_MODES)}, engine, or variants of it")  # fmt: skip
    add(
        "--cells",
        default="*",
        metavar="LIST",
        help="only these: QEMU/GUEST/LINK/MEMORY, with *",
    )
    add("--repeats", type=int, default=3, metavar="N", help="runs of each mode (default: 3)")
    add("--engine", action="append", default=[], metavar="NAME[@FOLDER]=OPTIONS",
        help="another way to call the engine, or one installed elsewhere")  # fmt: skip
    add(
        "--engine-options",
        default="",
        metavar="WORDS",
        help="migrate-src's, for all engine runs",
    )
    add("--dst-options", default="", metavar="WORDS", help="migrate-dst's, likewise")
    add("--attach", action="store_true", help="migrate-dst gets a running QEMU, starts none")
    add("--downtime-limit", default="300ms", metavar="TIME", help="of QEMU and of the engine")
    add("--timeout", default="120s", metavar="TIME", help="after that it did not converge")
    add("--give-up", type=int, default=0, metavar="N",
        help="leave out a mode's repeats after N that did not converge (0: never)")  # fmt: skip
    add("--congestion-control", default="cubic", metavar="NAME", help="TCP's, or 'default'")
    add_sizes(parser)
    add("--json", type=Path, metavar="FILE", help="write raw runs and machine facts")
    add("--resume", action="store_true", help="go on with the FILE of --json, keep its runs")
    add("--show", action="store_true", help="only print the tables of the FILE of --json")
    add("--markdown", action="store_true", help="print the tables in Markdown")


def plan_from(options: argparse.Namespace) -> Plan:
    """Check the options and say what to do.

    Raises:
        ValueError: A value that cannot be.
    """
    common = EngineMode(
        tuple(shlex.split(options.engine_options)),
        tuple(shlex.split(options.dst_options)),
        attach=options.attach,
    )
    modes = _list(options.modes)
    cells = Choice(
        _list(options.qemu),
        _list(options.guests),
        _list(options.links.lower()),
        _list(options.memory),
        _list(options.cells),
    ).cells()
    if options.repeats < 1:
        raise ValueError(f"expected at least 1 repeat, got {options.repeats}")
    control = options.congestion_control
    return Plan(
        cells=cells,
        modes=modes,
        engines=engine_modes(modes, options.engine, common),
        repeats=options.repeats,
        guests={cell.guest: resized(GUESTS[cell.guest], options) for cell in cells},
        downtime_limit_ms=parse_duration_ns(options.downtime_limit) // NS_PER_MS,
        timeout_s=parse_duration_ns(options.timeout) / NS_PER_S,
        give_up=options.give_up,
        congestion_control=None if control == "default" else control,
    )


def _list(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",")))


def print_tables(results: Results, *, markdown: bool) -> None:
    """Print medians, ranges, ratios, memory and what did not arrive, on stdout."""
    modes = dict.fromkeys(run.mode for run in results.runs)
    engines = [mode for mode in modes if mode not in NATIVE_MODES]
    tables: list[Table] = [
        figures_table(results.runs),
        ratios_table(results.runs, engines),
        memory_table(results.runs),
    ]
    for table in tables:
        if table.rows:
            print(table.markdown() if markdown else table.text(), end="\n\n")
    for line in failures(results.runs):
        print(f"- {line}")
    facts = "; ".join(machine_lines(results.machine))
    speeds = ", ".join(f"{name} {mbit:.0f}" for name, mbit in results.links_mbit_per_s.items())
    loads = summarize(run.load_average for run in results.runs)
    if loads is not None:
        print(f"load average before the runs: {loads.text(1)}")
    print(f"{facts}; one TCP connection gets, in Mbit/s: {speeds}")


def run(options: argparse.Namespace) -> int:
    """Compare; 0 when no run failed, 1 when some did, 130 after a signal, else an error's code."""
    return exit_status("migrate-lab compare", partial(_run, options))


def _run(options: argparse.Namespace) -> int:
    if options.json is None and (options.resume or options.show):
        raise ParamsError("--resume and --show need --json FILE")
    if options.show:
        print_tables(Results.load(options.json), markdown=options.markdown)
        return 0
    if options.json is not None and options.json.exists() and not options.resume:
        raise ParamsError(f"{options.json} exists: give --resume, or another file")
    plan = plan_from(options)
    say = talking_clock()
    binaries = {
        version: find_qemu(version)
        for version in dict.fromkeys(cell.qemu for cell in plan.cells)
    }
    guest_image.build()
    mib = max(kind.workload.device_mib for kind in plan.guests.values())
    content = file_content.build(mib) if mib else None
    facts = machine_facts(binaries, None if content is None else content.xxh3)
    if options.resume and options.json.exists():
        results = Results.load(options.json)
        results.check_machine(facts)
    else:
        results = Results(facts, options.json)
    image = None if content is None else content.path
    finished = run_until_signal(Comparison(plan, binaries, image, results, say).run, say)
    print_tables(results, markdown=options.markdown)
    if not finished:
        return INTERRUPTED
    return 1 if has_failed(results.runs) else 0
