"""Keys and certificates for tests: Docker's token authentication as a registry trusts it, and TLS as nobody does."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from registries import PASSWORD, Asked, reply


class TokenServer:
    """Docker's token authentication: tokens for whoever knows the password, signed so that the registry trusts them."""

    def __init__(self, directory: Path) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = _self_signed(self._key)
        self.bundle = directory / "token.pem"
        directory.mkdir(parents=True, exist_ok=True)
        self.bundle.write_bytes(self._certificate.public_bytes(Encoding.PEM))
        self.scopes: list[list[str]] = []
        self.logins: list[str] = []

    async def answer(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        """Give out a token for everything that was asked for."""
        scopes = parse_qs(urlsplit(asked.target).query).get("scope", [])
        self.scopes.append(scopes)
        login = asked.headers.get("authorization", "")
        self.logins.append(login)
        if login != "Basic " + base64.b64encode(f"ann:{PASSWORD}".encode()).decode():
            return reply(writer, 401)
        return reply(writer, 200, json.dumps({"token": self._token(scopes)}).encode())

    def _token(self, scopes: list[str]) -> str:
        access = []
        for scope in scopes:
            kind, repository, actions = scope.split(":")
            access.append({"type": kind, "name": repository, "actions": actions.split(",")})
        chain = [base64.b64encode(self._certificate.public_bytes(Encoding.DER)).decode()]
        head = {"typ": "JWT", "alg": "ES256", "x5c": chain}
        body = {
            "iss": "tokens", "sub": "ann", "aud": "here", "exp": 4_000_000_000, "nbf": 0, "iat": 0, "jti": "1",
            "access": access,
        }  # fmt: skip
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (head, body))
        r, s = utils.decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(SHA256())))
        return f"{signed}.{_base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def certificate_of_nobody(directory: Path) -> ssl.SSLContext:
    """TLS for a server whose certificate no authority has signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = directory / "nobody.pem"
    pem.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + _self_signed(key).public_bytes(Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tokens")])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
