"""The command ``migrate-lab``: one subcommand for each thing to find out."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from migrate.cli.parsing import installed_version
from migrate.errors import ParamsError
from migrate.lab import compare_command, inspect, round_trip, tls_init


class _OneLineParser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(ParamsError.exit_code, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the command line; each subcommand sets ``run`` to what runs it."""
    parser = _OneLineParser(
        prog="migrate-lab",
        description="Look into migrations and try them out.",
        allow_abbrev=False,
    )
    version = f"{parser.prog} {installed_version()}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    inspect_parser = commands.add_parser(
        "inspect",
        help="print what a captured or live migration stream contains",
        description=inspect.DESCRIPTION,
        epilog=inspect.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    inspect.add_arguments(inspect_parser)
    inspect_parser.set_defaults(run=inspect.run)
    compare = commands.add_parser(
        "compare",
        help=compare_command.SUMMARY,
        description=compare_command.DESCRIPTION,
        epilog=compare_command.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare_command.add_arguments(compare)
    compare.set_defaults(run=compare_command.run)
    trip = commands.add_parser(
        "round-trip",
        help=round_trip.SUMMARY,
        description=round_trip.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    round_trip.add_arguments(trip)
    trip.set_defaults(run=round_trip.run)
    tls = commands.add_parser(
        "tls-init",
        help=tls_init.SUMMARY,
        description=tls_init.DESCRIPTION,
        epilog=tls_init.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tls_init.add_arguments(tls)
    tls.set_defaults(run=tls_init.run)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; its result is the exit status."""
    options = build_parser().parse_args(argv)
    sys.exit(options.run(options))
