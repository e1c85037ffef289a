"""The command ``migrate-dst``."""

import sys

from migrate.cli.options import parse_destination
from migrate.cli.recover import asks_for_recovery, parse_destination_recovery
from migrate.cli.run import run_command
from migrate.destination import DestinationRun
from migrate.recovery.destination import DestinationRecovery
from migrate.runtime import RealRuntime
from migrate.session import Session


def main() -> None:
    """Run migrate-dst; the exit code says whether the guest is here."""
    if asks_for_recovery(sys.argv[1:]):
        asked = parse_destination_recovery(sys.argv[1:])
        session = Session("destination", asked.output, RealRuntime())
        sys.exit(run_command(DestinationRecovery(asked, session), session))
    params = parse_destination(sys.argv[1:])
    session = Session("destination", params.output, RealRuntime())
    sys.exit(run_command(DestinationRun(params, session), session))
