"""The command ``migrate-src``."""

import sys

from migrate.cli.options import parse_source
from migrate.cli.recover import asks_for_recovery, parse_source_recovery
from migrate.cli.run import run_command
from migrate.recovery.source import SourceRecovery
from migrate.runtime import RealRuntime
from migrate.session import Session
from migrate.source import SourceRun


def main() -> None:
    """Run migrate-src; the exit code says whether the guest is on the destination."""
    if asks_for_recovery(sys.argv[1:]):
        asked = parse_source_recovery(sys.argv[1:])
        session = Session("source", asked.output, RealRuntime())
        sys.exit(run_command(SourceRecovery(asked, session), session))
    params = parse_source(sys.argv[1:])
    session = Session("source", params.output, RealRuntime())
    sys.exit(run_command(SourceRun(params, session), session))
