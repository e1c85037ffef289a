"""Directories of certificates for hosts, and the CA that issues them; see ``tls_init``."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from migrate.errors import ParamsError, TlsError
from migrate.lab.certificates import (
    Pair,
    Validity,
    general_name,
    issue,
    make_authority,
    read_pair,
)
from migrate.transport.private_file import check_private
from migrate.transport.tls_credentials import load_credentials
from proto.link.state import Role

CA_DAYS: Final = 3650
"""Ten years: its certificate has to be copied to every host again when it ends."""

MAX_HOST_DAYS: Final = CA_DAYS

MAX_COMMON_NAME: Final = 64
"""Characters, as X.509 has it."""

_FILES: Final = {Role.SOURCE: "client", Role.DESTINATION: "server"}


def initialise(directory: Path, hosts: Sequence[Sequence[str]], *, days: int) -> list[Path]:
    """Make a CA, unless there is one, and a directory for each host.

    Args:
        directory: Where; made if it is missing.
        hosts: Names and addresses of each host; the first names its directory.
        days: How long the hosts' certificates are valid.

    Returns:
        The hosts' directories.

    Raises:
        ParamsError: A name is none, comes twice, or was given a directory before.
        TlsError: The CA cannot be used, or the disk does not take a file.
    """
    if not 1 <= days <= MAX_HOST_DAYS:
        raise ParamsError(f"expected --days from 1 to {MAX_HOST_DAYS}, got {days}")
    folders = _check_hosts(directory, hosts)
    validity = Validity.days(days)
    issued = {}
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = _authority(directory)
        for folder, names in zip(folders, hosts, strict=True):
            issued[folder] = {
                role: issue(authority, names[0], names, role, validity) for role in Role
            }
        for folder, pairs in issued.items():
            _write_host(folder, authority, pairs)
    except OSError as error:
        raise TlsError(f"cannot write {error.filename}: {error.strerror}") from error
    for folder in folders:
        for role in Role:
            load_credentials(folder, role)
    return folders


def _check_hosts(directory: Path, hosts: Sequence[Sequence[str]]) -> list[Path]:
    folders = []
    for names in hosts:
        for name in names:
            general_name(name)
        if len(names[0]) > MAX_COMMON_NAME:
            raise ParamsError(
                f"expected a first name of at most {MAX_COMMON_NAME} characters, "
                f"got {names[0]!r}"
            )
        folder = directory / names[0]
        if folder in folders or folder.exists():
            raise ParamsError(
                f"{folder} exists already: remove it to give that host new certificates"
            )
        folders.append(folder)
    return folders


def _authority(directory: Path) -> Pair:
    """Read the CA of this directory, or make it."""
    certificate, key = directory / "ca-cert.pem", directory / "ca-key.pem"
    if certificate.exists() or key.exists():
        check_private(key, TlsError)
        return read_pair(certificate, key)
    name = f"precopy CA of {socket.gethostname()}"[:MAX_COMMON_NAME]
    authority = make_authority(name, Validity.days(CA_DAYS))
    _write(key, authority.key_pem, 0o600)
    _write(certificate, authority.certificate_pem, 0o644)
    return authority


def _write_host(folder: Path, authority: Pair, pairs: dict[Role, Pair]) -> None:
    folder.mkdir(mode=0o700)
    _write(folder / "ca-cert.pem", authority.certificate_pem, 0o644)
    for role, pair in pairs.items():
        _write(folder / f"{_FILES[role]}-cert.pem", pair.certificate_pem, 0o644)
        _write(folder / f"{_FILES[role]}-key.pem", pair.key_pem, 0o600)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a new file that was never readable by more than ``mode`` says."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
