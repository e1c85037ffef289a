"""What a user asks of the link's safety: part of the parameters of both commands."""

import contextlib
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrate.errors import ParamsError

_HOSTNAME: Final = re.compile(r"[0-9A-Za-z_:](?:[0-9A-Za-z._:-]{0,251}[0-9A-Za-z_:])?")
"""A DNS name or an address, IPv6 too."""

MAX_AUTHZ_NAMES: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSecurity:
    """How the link is protected; by default not at all.

    Attributes:
        tls_dir: Directory with certificates and keys: only TLS 1.3, both ends verified.
        tls_hostname: The destination's name in its certificate; ``None``: as it is connected to.
        tls_authz: Names of which a source's certificate must have one; empty: any of the CA.
        token_file: A secret that both ends must prove to have; of mode 0600.
    """

    tls_dir: Path | None = None
    tls_hostname: str | None = None
    tls_authz: tuple[str, ...] = ()
    token_file: Path | None = None

    def __post_init__(self) -> None:
        if self.tls_dir is None and self.tls_hostname is not None:
            raise ParamsError("--tls-hostname only works with --tls-dir")
        if self.tls_dir is None and self.tls_authz:
            raise ParamsError("--tls-authz only works with --tls-dir")
        if self.tls_hostname is not None and not _HOSTNAME.fullmatch(self.tls_hostname):
            raise ParamsError(
                f"expected a host name or an address for --tls-hostname, "
                f"got {self.tls_hostname!r}"
            )
        if not all(self.tls_authz) or len(self.tls_authz) > MAX_AUTHZ_NAMES:
            raise ParamsError(
                f"expected 1 to {MAX_AUTHZ_NAMES} names for --tls-authz, none empty"
            )


UNPROTECTED: Final = LinkSecurity()
"""Neither TLS nor a token: for a trusted network, or a tunnel."""


def is_loopback(host: str) -> bool:
    """Whether only this host reaches an address that a socket was bound to."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    return False
