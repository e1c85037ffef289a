"""Certificates and keys of one end, in the directory that QEMU or libvirt users already have.

    ca-cert.pem                        who may issue certificates to both ends
    ca-crl.pem                         optional: certificates that are trusted no more
    server-cert.pem, server-key.pem    of migrate-dst
    client-cert.pem, client-key.pem    of migrate-src

What can be wrong with them is found before anybody connects. OpenSSL says little of a certificate
that it was given to show, so both ends of a handshake are played here, in memory, and the one that
verifies says what the other command would say of it.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from migrate.errors import TlsError
from migrate.transport.private_file import check_private
from migrate.transport.tls_texts import reason_words, verification_words
from proto.link.state import Role

COMMAND: Final = {Role.SOURCE: "migrate-src", Role.DESTINATION: "migrate-dst"}


@dataclass(frozen=True, slots=True)
class Credentials:
    """The files of one end; ``crl`` is None where there is no such list."""

    ca: Path
    crl: Path | None
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class _Layout:
    """Names of the files below the directory; those of an end belong to its role."""

    ca: str
    crl: str
    ends: dict[Role, tuple[str, str]]


_LAYOUTS: Final = (
    _Layout(
        "ca-cert.pem",
        "ca-crl.pem",
        {
            Role.SOURCE: ("client-cert.pem", "client-key.pem"),
            Role.DESTINATION: ("server-cert.pem", "server-key.pem"),
        },
    ),
    _Layout(  # libvirt's own connections: /etc/pki
        "CA/cacert.pem",
        "CA/cacrl.pem",
        {
            Role.SOURCE: ("libvirt/clientcert.pem", "libvirt/private/clientkey.pem"),
            Role.DESTINATION: ("libvirt/servercert.pem", "libvirt/private/serverkey.pem"),
        },
    ),
)


def find_credentials(directory: Path, role: Role) -> Credentials:
    """Find an end's files.

    Raises:
        TlsError: One is missing, or the key can be read by others.
    """
    if not directory.is_dir():
        raise TlsError(f"--tls-dir {directory} is not a directory")
    there = (layout for layout in _LAYOUTS if (directory / layout.ca).exists())
    layout = next(there, _LAYOUTS[0])
    certificate, key = layout.ends[role]
    for name in (layout.ca, certificate, key):
        if not (directory / name).is_file():
            raise TlsError(
                f"{directory / name} is missing: {COMMAND[role]} needs {layout.ca}, "
                f"{certificate} and {key} in its --tls-dir"
            )
    check_private(directory / key, TlsError)
    crl = directory / layout.crl
    return Credentials(
        ca=directory / layout.ca,
        crl=crl if crl.exists() else None,
        certificate=directory / certificate,
        key=directory / key,
    )


def load_credentials(directory: Path, role: Role) -> ssl.SSLContext:
    """Load an end's files and make sure that the other end will accept them.

    Raises:
        TlsError: A file is missing, unsafe, unreadable or no PEM, the key is not the
            certificate's, or the certificate is not valid for this role.
    """
    credentials = find_credentials(directory, role)
    context = make_context(credentials, role)
    check_own_certificate(credentials, role)
    return context


def make_context(credentials: Credentials, role: Role) -> ssl.SSLContext:
    """Build what connections are made with: TLS 1.3, both ends show and verify certificates.

    Raises:
        TlsError: A file cannot be used.
    """
    client = role is Role.SOURCE
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if client else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.hostname_checks_common_name = False
    if not client:
        context.num_tickets = 0  # a connection is made once; nobody comes back with a ticket
    _load_trust(context, credentials)
    _load_chain(context, credentials)
    return context


def _load_trust(context: ssl.SSLContext, credentials: Credentials) -> None:
    _load_pem(context, credentials.ca)
    if not context.get_ca_certs():
        raise TlsError(f"{credentials.ca} holds no certificate of a CA")
    if credentials.crl is not None:
        _load_pem(context, credentials.crl)
        if not context.cert_store_stats()["crl"]:
            raise TlsError(f"{credentials.crl} holds no revocation list in PEM form")
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF


def _load_pem(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise TlsError(
            f"{path} holds nothing that is PEM and can be used: {reason_words(error)}"
        ) from error
    except OSError as error:
        raise TlsError(f"cannot read {path}: {error.strerror}") from error


def _load_chain(context: ssl.SSLContext, credentials: Credentials) -> None:
    # A certificate that cannot be read gives the same error as such a key; tell them apart.
    _load_pem(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), credentials.certificate)
    certificate, key = credentials.certificate, credentials.key
    try:
        context.load_cert_chain(certificate, key, password=lambda: _refuse_encrypted(key))
    except ssl.SSLError as error:
        if error.reason in {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"}:
            raise TlsError(f"{key} is not the key of {certificate}") from error
        raise TlsError(f"cannot use {certificate} with {key}: {reason_words(error)}") from error
    except OSError as error:
        raise TlsError(f"cannot read {key}: {error.strerror}") from error


def _refuse_encrypted(key: Path) -> NoReturn:
    raise TlsError(f"{key} is encrypted; expected a key without a password, of mode 0600")


def check_own_certificate(credentials: Credentials, role: Role) -> None:
    """Verify our own certificate as the other end will, but for the host's name.

    Raises:
        TlsError: It has expired, is not valid yet, was revoked, is of another CA or for another
            purpose.
    """
    contexts = {
        Role.SOURCE: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        Role.DESTINATION: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
    }
    for end, context in contexts.items():
        context.check_hostname = False
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_NONE if end is role else ssl.CERT_REQUIRED
        _load_trust(context, credentials)
        _load_chain(context, credentials)
    try:
        _play_handshake(contexts[Role.SOURCE], contexts[Role.DESTINATION])
    except ssl.SSLCertVerificationError as error:
        raise TlsError(f"{credentials.certificate} {verification_words(error)}") from error
    except ssl.SSLError as error:
        raise TlsError(
            f"{credentials.certificate} cannot be used: {reason_words(error)}"
        ) from error


def _play_handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """Let two contexts shake hands without a connection."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while ends:
        for end in ends[:]:
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue
