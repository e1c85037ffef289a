"""What the command lines have in common: how a mistake is told, and options that several have."""

import argparse
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn, TypeVar

from migrate.errors import ParamsError
from migrate.link_security import LinkSecurity
from migrate.params import OutputParams, default_state_dir
from migrate.timeouts import DEFAULTS, Timeouts
from migrate.units import NS_PER_MS, NS_PER_S, parse_duration_ns

T = TypeVar("T")


class _OneLineParser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(ParamsError.exit_code, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.HelpFormatter):
    """Adds "(default: …)" to every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if shown else action.help


def make_parser(
    prog: str, description: str, epilog: str, usage: str | None = None
) -> argparse.ArgumentParser:
    """Make a parser that knows ``--help`` and ``--version`` and tells mistakes in one line."""
    parser = _OneLineParser(
        prog=prog, description=description, epilog=epilog, usage=usage,
        formatter_class=_HelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"{prog} {installed_version()}")
    return parser


def checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Let argparse show a parser's own error text instead of "invalid value"."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except (ValueError, ParamsError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def parse_ms(text: str) -> int:
    """Read a duration as milliseconds; raises ``ValueError`` for anything else."""
    return parse_duration_ns(text) // NS_PER_MS


def parse_seconds(text: str) -> float:
    """Read a duration as seconds; raises ``ValueError`` for anything else."""
    return parse_duration_ns(text) / NS_PER_S


def add_state_dir(group: argparse._ActionsContainer) -> None:
    """Add where records of handovers are."""
    group.add_argument(
        "--state-dir", metavar="DIR", type=Path,
        default=default_state_dir(os.environ, os.getuid()),
        help="where the handover is recorded for recovery; must survive a reboot",
    )  # fmt: skip


def add_security(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that both commands have of the link's safety; see ``link_security``."""
    group = parser.add_argument_group("who may take part, and who may look (docs/security.md)")
    group.add_argument(
        "--tls-dir", metavar="DIR", type=Path,
        help="only TLS: certificates and keys in the layout of QEMU and libvirt",
    )  # fmt: skip
    group.add_argument(
        "--token-file", metavar="FILE", type=Path,
        help="a secret of at least 32 bytes that both sides must prove to have",
    )  # fmt: skip
    return group


def link_security(options: argparse.Namespace) -> LinkSecurity:
    """Collect what ``add_security`` added, and what one side adds to it."""
    return LinkSecurity(
        tls_dir=options.tls_dir,
        tls_hostname=getattr(options, "tls_hostname", None),
        tls_authz=tuple(getattr(options, "tls_authz", None) or ()),
        token_file=options.token_file,
    )


def add_timeouts(parser: argparse.ArgumentParser) -> None:
    """Add how long other processes are waited for; see ``timeouts_of``."""
    group = parser.add_argument_group("patience (docs/faults.md); the same for both commands")
    group.add_argument(
        "--peer-timeout", metavar="TIME", type=checked(parse_seconds), default="15s",
        help="the other command is lost after so long a silence",
    )  # fmt: skip
    group.add_argument(
        "--qemu-timeout", metavar="TIME", type=checked(parse_seconds), default="30s",
        help="how long a QEMU may need for one step of the handover, opening its disks included",
    )  # fmt: skip


def add_reconnect(parser: argparse.ArgumentParser, *, stopped: bool) -> None:
    """Add how long a lost link is waited for.

    Args:
        parser: Of the command.
        stopped: Also while the guest stands still, which only the source can know.
    """
    group = parser.add_argument_group("a link that is lost (docs/faults.md)")
    group.add_argument(
        "--reconnect-timeout", metavar="TIME", type=checked(parse_seconds), default="5min",
        help="how long it is waited for; 0s: its loss ends the migration",
    )  # fmt: skip
    if stopped:
        group.add_argument(
            "--stopped-timeout", metavar="TIME", type=checked(parse_seconds), default=None,
            help="the same while the guest stands still; then it goes on here, and later from "
            "pre-copy (default: 3s beyond --downtime-limit)",
        )  # fmt: skip


def timeouts_of(options: argparse.Namespace) -> Timeouts:
    """Collect what the functions above added; raises ``ParamsError`` for what cannot work."""
    return Timeouts(
        peer_s=options.peer_timeout,
        qemu_s=options.qemu_timeout,
        reconnect_s=getattr(options, "reconnect_timeout", DEFAULTS.reconnect_s),
        stopped_s=getattr(options, "stopped_timeout", None),
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of reports and progress; see ``output_params``."""
    group = parser.add_argument_group("what is told (progress and logs go to stderr)")
    group.add_argument("--report", metavar="FILE.json", type=Path, help="write the JSON report")
    group.add_argument(
        "--html", metavar="FILE.html", type=Path, help="write the report as a page"
    )
    group.add_argument(
        "--trace",
        metavar="FILE.jsonl",
        type=Path,
        help="write one JSON object a line meanwhile",
    )
    group.add_argument("--json", action="store_true", help="print the JSON report on stdout")
    group.add_argument("--quiet", action="store_true", help="no progress display")


def output_params(options: argparse.Namespace) -> OutputParams:
    """Collect what ``add_output`` added."""
    return OutputParams(
        report_path=options.report,
        html_path=options.html,
        trace_path=options.trace,
        json=options.json,
        quiet=options.quiet,
    )


def installed_version() -> str:
    """The version of this package, for people."""
    try:
        return version("precopy")
    except PackageNotFoundError:
        # Run from a checkout that was never installed.
        return "(not installed)"
