"""The command ``migrate-dst``."""

import sys

from migrate.cli.options import parse_destination
from migrate.cli.run import run_command
from migrate.destination import DestinationRun
from migrate.runtime import RealRuntime
from migrate.session import Session


def main() -> None:
    """Run migrate-dst; the exit code says whether the guest is here."""
    params = parse_destination(sys.argv[1:])
    session = Session("destination", params.output, RealRuntime())
    sys.exit(run_command(DestinationRun(params, session), session))
