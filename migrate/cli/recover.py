"""The command lines of ``migrate-src --recover`` and ``migrate-dst --recover``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from migrate.cli.parsing import (
    add_output,
    add_security,
    add_state_dir,
    add_timeouts,
    checked,
    link_security,
    make_parser,
    output_params,
    parse_seconds,
    timeouts_of,
)
from migrate.errors import ParamsError
from migrate.params import LinkAddress
from migrate.recovery.params import DestinationRecoveryParams, SourceRecoveryParams

OPTION = "--recover"


def asks_for_recovery(argv: Sequence[str]) -> bool:
    """Whether a command line is one of these; what stands behind ``--`` is QEMU's."""
    ours = argv[: argv.index("--")] if "--" in argv else argv
    return any(word == OPTION or word.startswith(f"{OPTION}=") for word in ours)


def source_recovery_parser() -> argparse.ArgumentParser:
    """Build the parser of ``migrate-src --recover``."""
    parser = make_parser(
        "migrate-src",
        "After a crash: bring the guest back at the source if it may run there, or say what would "
        "be needed. It can be started as often as one likes, also while the other side recovers.",
        "The exit status is 0 only when it is known on which side the guest is, in the state it "
        "had.",
    )
    _add_record(parser, "source")
    parser.add_argument(
        "--to", metavar="HOST:PORT", type=checked(LinkAddress.parse),
        help="where 'migrate-dst --recover ... --listen' waits (default: where migrate-dst did)",
    )  # fmt: skip
    parser.add_argument(
        "--destination-is-fenced", action="store_true",
        help="a person's word that the destination's copy of the guest is dead and stays so, or, "
        "where another migration took the guest from the source, that one's: the guest goes on at "
        "the source as it left; a wrong word lets it run twice",
    )  # fmt: skip
    parser.add_argument(
        "--connect-timeout", metavar="TIME", type=checked(parse_seconds), default="10s",
        help="how long to try to reach migrate-dst",
    )  # fmt: skip
    add_security(parser).add_argument(
        "--tls-hostname", metavar="NAME",
        help="the destination's name in its certificate, if not the one in --to",
    )  # fmt: skip
    add_timeouts(parser)
    add_output(parser)
    return parser


def destination_recovery_parser() -> argparse.ArgumentParser:
    """Build the parser of ``migrate-dst --recover``."""
    parser = make_parser(
        "migrate-dst",
        "After a crash: run the guest if it is the destination's, otherwise make sure that it "
        "never runs here. It can be started as often as one likes.",
        "The exit status is 0 only when it is known on which side the guest is.",
    )
    _add_record(parser, "destination")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", type=checked(LinkAddress.parse),
        help="then wait for 'migrate-src --recover' and answer it",
    )  # fmt: skip
    parser.add_argument(
        "--hello-timeout", metavar="TIME", type=checked(parse_seconds), default="10s",
        help="how long a new connection may take to say what it wants",
    )  # fmt: skip
    add_security(parser).add_argument(
        "--tls-authz", metavar="NAME", action="append",
        help="answer only sources whose certificate has this name; may be repeated",
    )  # fmt: skip
    add_timeouts(parser)
    add_output(parser)
    return parser


def parse_source_recovery(argv: Sequence[str]) -> SourceRecoveryParams:
    """Read the arguments of ``migrate-src --recover``; exits as ``parse_source``."""
    parser = source_recovery_parser()
    options = parser.parse_args(_help_first(argv))
    try:
        return SourceRecoveryParams(
            record=options.recover,
            qmp=options.qmp,
            to=options.to,
            fenced=options.destination_is_fenced,
            state_dir=options.state_dir,
            connect_timeout_s=options.connect_timeout,
            security=link_security(options),
            timeouts=timeouts_of(options),
            output=output_params(options),
        )
    except ParamsError as error:
        parser.error(str(error))


def parse_destination_recovery(argv: Sequence[str]) -> DestinationRecoveryParams:
    """Read the arguments of ``migrate-dst --recover``; exits as ``parse_source``."""
    parser = destination_recovery_parser()
    options = parser.parse_args(_help_first(argv))
    try:
        return DestinationRecoveryParams(
            record=options.recover,
            qmp=options.qmp,
            listen=options.listen,
            state_dir=options.state_dir,
            hello_timeout_s=options.hello_timeout,
            security=link_security(options),
            timeouts=timeouts_of(options),
            output=output_params(options),
        )
    except ParamsError as error:
        parser.error(str(error))


def _help_first(argv: Sequence[str]) -> Sequence[str]:
    """Have ``--recover --help`` print the help, not the complaint that a record is missing."""
    return ["--help"] if {"-h", "--help"} & set(argv) else argv


def _add_record(parser: argparse.ArgumentParser, side: str) -> None:
    parser.add_argument(
        OPTION, metavar="STATE_FILE_OR_MIGRATION_ID", required=True,
        help="what the interrupted command recorded, as its last words name it",
    )  # fmt: skip
    parser.add_argument(
        "--qmp", metavar="SOCKET", type=Path,
        help=f"QMP socket of the {side} QEMU (default: as recorded)",
    )  # fmt: skip
    add_state_dir(parser)
