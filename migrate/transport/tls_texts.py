"""OpenSSL's errors in the words of somebody who has to do something about them."""

import ssl
from typing import Final

_VERIFICATION: Final = {
    2: "was not issued by a CA in our ca-cert.pem",
    3: "cannot be checked: ca-crl.pem holds no revocation list of its CA",
    7: "was not issued by a CA in our ca-cert.pem",
    8: "cannot be checked: ca-crl.pem was not made by its CA",
    9: "is not valid yet (are the clocks of both hosts right?)",
    10: "has expired",
    11: "cannot be checked: ca-crl.pem is not valid yet",
    12: "cannot be checked: ca-crl.pem has expired",
    18: "was not issued by a CA in our ca-cert.pem, but by itself",
    19: "was not issued by a CA in our ca-cert.pem",
    20: "was not issued by a CA in our ca-cert.pem",
    21: "was not issued by a CA in our ca-cert.pem",
    23: "was revoked",
    26: "is not for this purpose: server-cert.pem must be for servers, client-cert.pem for clients",
    79: "was issued by a certificate that is no CA",
}
"""By the codes of X509_verify_cert, which are part of OpenSSL's interface."""

NAME_MISMATCH: Final = frozenset({62, 64})
"""The certificate has no such host name, or no such IP address."""

_ALERTS: Final = {
    "CERTIFICATE_EXPIRED": "it, or the list of revoked ones, has expired",
    "CERTIFICATE_REVOKED": "it was revoked",
    "CERTIFICATE_REQUIRED": "we showed none",
    "UNKNOWN_CA": "it was not issued by a CA that the other side trusts",
    "UNSUPPORTED_CERTIFICATE": "it is not for this purpose",
    "BAD_CERTIFICATE": "it is for another name, not valid yet, or damaged; the other side says "
    "which",
    "CERTIFICATE_UNKNOWN": "the other side says why",
}
"""By the alert's name in OpenSSL's reason, which carries an older protocol's name in front."""


def verification_words(error: ssl.SSLCertVerificationError) -> str:
    """What is wrong with a certificate; continues "the certificate …"."""
    known = _VERIFICATION.get(error.verify_code)
    return known or f"is not valid: {error.verify_message}"


def alert_name(error: ssl.SSLError) -> str:
    """The alert that the peer ended TLS with, empty if this error is none."""
    _, found, name = (error.reason or "").partition("_ALERT_")
    return name if found else ""


def refusal_words(alert: str) -> str:
    """Why a peer that sent this alert does not take our certificate; empty if that was not it."""
    return _ALERTS.get(alert, "")


def reason_words(error: ssl.SSLError) -> str:
    """OpenSSL's own reason without its decoration."""
    if error.reason:
        return error.reason.lower().replace("_", " ")
    return error.strerror or str(error)
