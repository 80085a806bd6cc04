# SPDX-License-Identifier: Apache-2.0
"""TLS between instances that share a secret: both sides' certificates are made of it."""

from __future__ import annotations

import datetime as dt
import hmac
import os
import ssl
from dataclasses import dataclass

from llm_datadist_torch.net.framing import Unreadable
from llm_datadist_torch.values.status import LLMStatusCode, error_for

_SALT = b"llm_datadist_torch links 2"
_NAME = "llm_datadist_torch"
_RECORD = 1 << 16


@dataclass(frozen=True, repr=False)
class LinkKeys:
    """The certificates of an instance, made of its secret: equal secrets make equal ones.

    Attributes:
        listener: Certificate (DER) of the listening side.
        dialer: Certificate (DER) of the dialing side.
        contexts: TLS settings of a listener and of a dialer.
    """

    listener: bytes
    dialer: bytes
    contexts: tuple[ssl.SSLContext, ssl.SSLContext]

    @classmethod
    def from_secret(cls, secret: str | None) -> LinkKeys | None:
        """The certificates of a secret; None without one.

        Raises:
            LLMFeatureNotEnabledError: The package ``cryptography``, or TLS 1.3, is missing.
        """
        if secret is None:
            return None
        if not ssl.HAS_TLSv1_3:
            raise error_for(
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                f"link_secret needs TLS 1.3, which {ssl.OPENSSL_VERSION} does not have",
                op="init",
                remedy="use a Python with OpenSSL 1.1.1 or later.",
            )
        # HKDF (RFC 5869), one block for each key.
        root = hmac.digest(_SALT, secret.encode("utf-8", "surrogatepass"), "sha256")
        listener = _certificate(_expand(root, b"listener"), "listener")
        dialer = _certificate(_expand(root, b"dialer"), "dialer")
        return cls(
            listener[0],
            dialer[0],
            (
                _context(ssl.PROTOCOL_TLS_SERVER, listener, dialer[0]),
                _context(ssl.PROTOCOL_TLS_CLIENT, dialer, listener[0]),
            ),
        )

    def protect(self, *, dialed: bool) -> Tls:
        """TLS for one connection that we have dialed, or accepted."""
        return Tls(self.contexts[dialed], self.listener if dialed else self.dialer, dialed=dialed)


class Tls:
    """TLS of one connection, in memory: what is received goes in, what is to be sent comes out.

    Thread safety: none; callers hold the connection's lock.

    Args:
        context: Our certificate, and the peer's.
        expected: The peer's certificate (DER).
        dialed: Whether we are the client.
    """

    def __init__(self, context: ssl.SSLContext, expected: bytes, *, dialed: bool) -> None:
        self._expected = expected
        self._received, self.to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._received, self.to_send, server_side=not dialed)

    def shake_hands(self, data: memoryview | bytes) -> bool:
        """Go on with the handshake; whether it is complete.

        Raises:
            Unreadable: The peer does not have the secret.
        """
        self._received.write(data)
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise Unreadable(str(error)) from error
        presented = self._ssl.getpeercert(binary_form=True) or b""
        if not hmac.compare_digest(presented, self._expected):
            raise Unreadable("the peer's certificate is not that of the secret")
        return True

    def encrypt(self, data: bytes) -> None:
        """Put this into ``to_send``, encrypted."""
        self._ssl.write(data)

    def decrypt(self, data: memoryview | bytes) -> bytes:
        """What the peer has sent, as far as it is complete.

        Raises:
            Unreadable: It has been changed on the way, or the peer has ended the session.
        """
        self._received.write(data)
        plain = []
        try:
            while piece := self._ssl.read(_RECORD):
                plain.append(piece)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise Unreadable(str(error)) from error
        return b"".join(plain)


def _expand(root: bytes, label: bytes) -> bytes:
    return hmac.digest(root, label + b"\x01", "sha256")


def _certificate(seed: bytes, role: str) -> tuple[bytes, bytes]:
    """A self-signed Ed25519 certificate (DER), the same for the same seed, and its key (PEM)."""
    # Only links with a secret need it.
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            f"link_secret needs the package cryptography: {error}",
            op="init",
            remedy="pip install 'llm_datadist_torch[secret]', or pip install cryptography.",
        ) from error
    key = Ed25519PrivateKey.from_private_bytes(seed)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"{_NAME} {role}")])
    # The dates are no protection here: a peer with the secret can choose any. They must not depend
    # on the hosts' clocks, and the signature is deterministic, so both sides make the same bytes.
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc))
        .not_valid_after(dt.datetime(9999, 12, 31, tzinfo=dt.timezone.utc))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, None)
    )
    return certificate.public_bytes(serialization.Encoding.DER), key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _context(protocol: int, own: tuple[bytes, bytes], peer: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=peer)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    # load_cert_chain() takes files only; this one is in memory, and nobody else sees it.
    memory = os.memfd_create("llm_datadist_torch.certificate", os.MFD_CLOEXEC)
    try:
        os.write(memory, ssl.DER_cert_to_PEM_cert(own[0]).encode() + own[1])
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
    return context
