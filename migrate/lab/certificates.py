"""Certificates for people without a CA, and for tests: P-256 keys, X.509 v3 as QEMU wants it.

The only module that needs the ``cryptography`` library, which is an extra of this package: hosts
that only migrate guests do without it.
"""

import contextlib
import datetime
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509  # noqa: TID251 - the one place that may
from cryptography.hazmat.primitives import hashes, serialization  # noqa: TID251
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: TID251
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID  # noqa: TID251

from migrate.errors import ParamsError, TlsError
from proto.link.state import Role

CLOCK_SKEW: Final = datetime.timedelta(hours=1)
"""Certificates begin so much earlier than now: another host's clock may be behind."""

_LABEL: Final = r"[0-9A-Za-z_](?:[0-9A-Za-z_-]{0,61}[0-9A-Za-z_])?"
_DNS_NAME: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")

_PURPOSES: Final = {
    Role.SOURCE: ExtendedKeyUsageOID.CLIENT_AUTH,
    Role.DESTINATION: ExtendedKeyUsageOID.SERVER_AUTH,
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The certificate, for anybody."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key, for nobody."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


@dataclass(frozen=True, slots=True)
class Validity:
    """From when until when."""

    begin: datetime.datetime
    end: datetime.datetime

    @classmethod
    def days(cls, days: int) -> "Validity":
        """So many days from now on."""
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        return cls(now - CLOCK_SKEW, now + datetime.timedelta(days=days))


def make_authority(name: str, validity: Validity) -> Pair:
    """Make a CA that issues certificates to hosts, but to no other CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _named(name)
    builder = _builder(subject, subject, key, validity)
    builder = builder.add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    builder = builder.add_extension(_key_usage(ca=True), critical=True)
    return Pair(builder.sign(key, hashes.SHA256()), key)


def issue(
    authority: Pair, name: str, hosts: Iterable[str], role: Role | None, validity: Validity
) -> Pair:
    """Issue a certificate.

    Args:
        authority: Who issues it.
        name: Its common name.
        hosts: DNS names and addresses of the host.
        role: Which end may show it; None: none of the two.
        validity: When it is valid.

    Raises:
        ParamsError: A host name is none.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    builder = _builder(_named(name), issuer.subject, key, validity)
    builder = builder.add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True
    )
    builder = builder.add_extension(_key_usage(ca=False), critical=True)
    purpose = _PURPOSES[role] if role is not None else ExtendedKeyUsageOID.CODE_SIGNING
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    known_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(known_by, critical=False)
    if names := [general_name(host) for host in hosts]:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return Pair(builder.sign(authority.key, hashes.SHA256()), key)


def revoke(authority: Pair, revoked: Sequence[Pair], validity: Validity) -> bytes:
    """Make a revocation list in PEM form."""
    builder = x509.CertificateRevocationListBuilder(
        issuer_name=authority.certificate.subject,
        last_update=validity.begin,
        next_update=validity.end,
    )
    for pair in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder(
                serial_number=pair.certificate.serial_number, revocation_date=validity.begin
            ).build()
        )
    crl = builder.sign(authority.key, hashes.SHA256())
    return crl.public_bytes(serialization.Encoding.PEM)


def read_pair(certificate: Path, key: Path) -> Pair:
    """Read a certificate and its key, both PEM.

    Raises:
        TlsError: They cannot be read, do not belong together, or the key is of another kind.
    """
    try:
        read = x509.load_pem_x509_certificate(certificate.read_bytes())
        secret = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise TlsError(f"cannot read {error.filename}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise TlsError(f"cannot use {certificate} with {key}: {error}") from error
    if not isinstance(secret, ec.EllipticCurvePrivateKey):
        raise TlsError(f"{key} is not a key that this command made")
    if secret.public_key() != read.public_key():
        raise TlsError(f"{key} is not the key of {certificate}")
    return Pair(read, secret)


def general_name(host: str) -> x509.GeneralName:
    """A host as a certificate names it.

    Raises:
        ParamsError: It is neither an address nor a DNS name in ASCII.
    """
    if "%" not in host:
        with contextlib.suppress(ValueError):
            return x509.IPAddress(ipaddress.ip_address(host))
    if len(host) <= 253 and _DNS_NAME.fullmatch(host):
        return x509.DNSName(host)
    raise ParamsError(f"expected a host name or an address, got {host!r}")


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, validity: Validity
) -> x509.CertificateBuilder:
    public_key = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity.begin)
        .not_valid_after(validity.end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
