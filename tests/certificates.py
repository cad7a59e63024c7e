"""Certificate authorities and certificates for tests, made anew each time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Pem:
    """Files of one certificate."""

    cert_file: str
    key_file: str


class Authority:
    """Signs certificates; ``ca_file`` is its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, name, self._key, timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
        self.ca_file = str(folder / f"{name}-ca.pem")
        Path(self.ca_file).write_bytes(
            builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )
        self._num_signed = 0

    def sign(
        self, dns_name: str, *, lasts: timedelta = timedelta(days=1), to: Pem | None = None
    ) -> Pem:
        """A certificate for ``dns_name``, written over ``to`` where that is given."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(dns_name, self._name, key, lasts)
        names = x509.SubjectAlternativeName([x509.DNSName(dns_name)])
        certificate = builder.add_extension(names, critical=False).sign(self._key, hashes.SHA256())
        stem = f"{self._name}-{self._num_signed}"
        self._num_signed += 1
        pem = to or Pem(str(self._folder / f"{stem}.pem"), str(self._folder / f"{stem}.key"))
        Path(pem.cert_file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        Path(pem.key_file).write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return pem


def _builder(
    subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, lasts: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + lasts)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
