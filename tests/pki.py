"""A small public key infrastructure: good certificates, and every kind of bad one."""

import datetime
import os
from pathlib import Path
from typing import Final

from migrate.lab.certificates import Pair, Validity, issue, make_authority, revoke
from proto.link.state import Role

HOSTS: Final = ("localhost", "127.0.0.1", "::1")
NAMES: Final = {Role.SOURCE: "client", Role.DESTINATION: "server"}

NOW: Final = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
VALID: Final = Validity.days(30)
EXPIRED: Final = Validity(NOW - datetime.timedelta(days=30), NOW - datetime.timedelta(days=1))
NOT_YET: Final = Validity(NOW + datetime.timedelta(days=1), NOW + datetime.timedelta(days=30))


class Pki:
    """One CA and a good certificate for each end."""

    def __init__(self) -> None:
        self.authority = make_authority("test CA", VALID)
        self.pairs = {role: self.issue(role) for role in Role}

    def issue(
        self,
        role: Role | None,
        *,
        name: str = "host-a",
        hosts: tuple[str, ...] = HOSTS,
        validity: Validity = VALID,
    ) -> Pair:
        return issue(self.authority, name, hosts, role, validity)

    def revoked(self, *pairs: Pair, validity: Validity = VALID) -> bytes:
        return revoke(self.authority, pairs, validity)

    def directory(
        self,
        path: Path,
        *,
        crl: bytes | None = None,
        source: Pair | None = None,
        destination: Pair | None = None,
    ) -> Path:
        """Write a directory as --tls-dir wants it, with these certificates or good ones."""
        path.mkdir()
        (path / "ca-cert.pem").write_bytes(self.authority.certificate_pem)
        given = {Role.SOURCE: source, Role.DESTINATION: destination}
        for role, name in NAMES.items():
            pair = given[role] or self.pairs[role]
            (path / f"{name}-cert.pem").write_bytes(pair.certificate_pem)
            write_secret(path / f"{name}-key.pem", pair.key_pem)
        if crl is not None:
            (path / "ca-crl.pem").write_bytes(crl)
        return path


def write_secret(path: Path, content: bytes, mode: int = 0o600) -> Path:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(content)
    path.chmod(mode)
    return path
