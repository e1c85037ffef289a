"""The command ``migrate-lab tls-init``: certificates for both commands, without a CA of one's own.

    DIR/ca-cert.pem  ca-key.pem      the CA; its key signs, and stays where it is
    DIR/HOST/        a directory for --tls-dir on that host, as source or destination

A second call with another host uses the same CA.
"""

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from migrate.errors import ParamsError, TlsError

DEFAULT_DAYS: Final = 730

LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")

SUMMARY: Final = "make certificates for --tls-dir, without a CA of one's own"

DESCRIPTION: Final = """\
Make a CA, and for each host a directory with everything that --tls-dir needs there. Each directory
is copied to its host, the CA's key to none. A later call adds hosts to the same CA."""

EPILOG: Final = """\
example:
  migrate-lab tls-init pki --host alpha,alpha.example.org,10.0.0.1 --host beta,10.0.0.2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="made if it is missing")
    parser.add_argument(
        "--host",
        metavar="NAME[,NAME...]",
        action="append",
        help="a host and all names and addresses under which others connect to it; may be "
        "repeated (default: this one)",
    )
    parser.add_argument(
        "--days",
        metavar="N",
        type=int,
        default=DEFAULT_DAYS,
        help="how long the hosts' certificates are valid (default: %(default)s; the CA's ten "
        "years)",
    )


def run(options: argparse.Namespace) -> int:
    """Make what was asked for; prints what to do with it."""
    try:
        from migrate.lab.host_certificates import initialise  # noqa: PLC0415 - needs an extra
    except ImportError as error:
        print(
            f"migrate-lab tls-init: needs the library {error.name}: "
            "pip install 'precopy[tls-init]'",
            file=sys.stderr,
        )
        return TlsError.exit_code
    try:
        hosts = [text.split(",") for text in options.host or [",".join(this_host())]]
        made = initialise(options.directory, hosts, days=options.days)
    except (ParamsError, TlsError) as error:
        print(f"migrate-lab tls-init: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(advice(options.directory, made)))
    return 0


def this_host() -> list[str]:
    """Names of this host."""
    name = socket.gethostname()
    return list(dict.fromkeys([name, *LOCAL_NAMES]))


def advice(directory: Path, folders: Sequence[Path]) -> list[str]:
    """What to copy where, and what then to say."""
    lines = [f"{directory / 'ca-key.pem'} signs certificates: keep it here, or take it offline"]
    lines += [
        f"{folder}: copy it to {folder.name}, for --tls-dir there: "
        f"scp -pr {folder} {folder.name}:/etc/precopy-tls"
        for folder in folders
    ]
    lines += [
        "then, with the destination's name as it is in its certificate:",
        "  migrate-dst --listen 0.0.0.0:7001 --tls-dir /etc/precopy-tls ...",
        f"  migrate-src --to {folders[-1].name}:7001 --tls-dir /etc/precopy-tls ...",
    ]
    return lines
