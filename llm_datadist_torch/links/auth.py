# SPDX-License-Identifier: Apache-2.0
"""Who may link with us: CURVE keys made of a shared secret, and the check of those who connect."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import threading
from dataclasses import dataclass

import zmq
from zmq.utils import z85

from llm_datadist_torch.values.status import LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

_SALT = b"llm_datadist_torch links 1"
_DOMAIN = b"llm_datadist_torch"
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_ZAP_FRAMES = 7
"""Version, request id, domain, address, identity, mechanism, and the client's public key."""
# Of ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH, which pyzmq has no name for.
_MECHANISM_MISMATCH = 0x11000002

SHARE_IT = "give all instances the same LLMConfig.link_secret, or none of them."

_warned = threading.Event()


@dataclass(frozen=True, repr=False)
class LinkKeys:
    """All keys of an instance, made of its secret: equal secrets make equal keys.

    Attributes:
        server: CURVE keys (public, secret) of whoever listens.
        client: CURVE keys (public, secret) of whoever dials.
        seal: Key of what the members of a communicator tell each other.
    """

    server: tuple[bytes, bytes]
    client: tuple[bytes, bytes]
    seal: bytes

    @classmethod
    def from_secret(cls, secret: str | None) -> LinkKeys | None:
        """The keys of a secret; None without one.

        Raises:
            LLMFeatureNotEnabledError: This ZeroMQ has no CURVE.
        """
        if secret is None:
            return None
        if not zmq.has("curve"):
            raise error_for(
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                f"link_secret needs CURVE, which ZeroMQ {zmq.zmq_version()} was built without",
                op="init",
                remedy="install pyzmq's own wheel, or a libzmq with libsodium.",
            )
        # HKDF (RFC 5869), one block for each key.
        root = hmac.digest(_SALT, secret.encode("utf-8", "surrogatepass"), "sha256")
        return cls(
            _curve_keys(_expand(root, b"server")),
            _curve_keys(_expand(root, b"client")),
            _expand(root, b"rendezvous"),
        )

    def secure_listener(self, socket: zmq.Socket[bytes]) -> None:
        """Let in only those who have the keys. To be called before it is bound."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.server[1])
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.server[0])
        # Without a domain nobody would be asked about the client's key.
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)

    def secure_dialer(self, socket: zmq.Socket[bytes]) -> None:
        """Talk only to those who have the keys. To be called before it is connected."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.server[0])
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.client[1])
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.client[0])


def _expand(root: bytes, label: bytes) -> bytes:
    return hmac.digest(root, label + b"\x01", "sha256")


def _curve_keys(seed: bytes) -> tuple[bytes, bytes]:
    secret = z85.encode(seed)
    return zmq.curve_public(secret), secret


class Doorkeeper:
    """Answers ZeroMQ when it asks whether a client's key is good (ZAP, rfc.zeromq.org 27).

    Thread safety: none; it belongs to the endpoint's thread, whose poller calls :meth:`serve`.

    Args:
        context: Of the sockets that it is asked about.
        keys: Those that are good.

    Attributes:
        socket: To be read by :meth:`serve`, and closed in the end.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: LinkKeys) -> None:
        self._client = z85.decode(keys.client[0])
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        try:
            self.socket.bind(_ZAP_ADDRESS)
        except zmq.ZMQError:
            self.socket.close()
            raise

    def serve(self) -> None:
        """Answer one question."""
        try:
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        good = (
            len(frames) == _ZAP_FRAMES
            and frames[5] == b"CURVE"
            and hmac.compare_digest(frames[6], self._client)
        )
        code, text = (b"200", b"") if good else (b"400", b"unknown key")
        self.socket.send_multipart([b"1.0", frames[1], code, text, b"", b""])


def why_no_connection(event: int, value: int, *, secured: bool) -> str:
    """What a failed handshake of a dialer says about secrets, else "".

    Args:
        event: What its monitor reports.
        value: The event's number.
        secured: Whether we have a secret.
    """
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "the peer does not accept this instance's link_secret"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == _MECHANISM_MISMATCH:
        if secured:
            return "this instance has a link_secret, and the peer has none"
        return "the peer has a link_secret, and this instance has none"
    # Who notices first closes the connection, and the other one sees no more than that.
    if event in (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
        if secured:
            return (
                "the peer ended the connection while it was being authenticated: it has another"
                " link_secret, or none, or does not speak this protocol"
            )
        return (
            "the peer ended the connection before it was up: it has a link_secret, and this"
            " instance has none; or it does not speak this protocol"
        )
    return ""


def is_loopback(host: str) -> bool:
    """Whether only this host reaches an address, given as IPv4 or IPv6 text."""
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def warn_of_network(address: str) -> None:
    """Say, once per process, that a link without a secret leaves this host.

    Args:
        address: The ZeroMQ address that is listened on or dialed.
    """
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if is_loopback(host) or _warned.is_set():
        return
    _warned.set()
    logger.warning(
        "links over %s are neither authenticated nor encrypted: whoever reaches the port can link,"
        " and read and write the caches; set LLMConfig.link_secret on all instances",
        host,
    )


class Seal:
    """Marks what members of a communicator tell each other, so that nobody else can say it.

    Without a key it only says that there is none, so that members who differ notice.

    Args:
        key: ``LinkKeys.seal``, or None.
    """

    _OPEN, _SEALED = b"0", b"1"

    def __init__(self, key: bytes | None) -> None:
        self._key = key

    def close(self, context: tuple[str, ...], value: bytes) -> bytes:
        """``value`` with its mark, good for this context only."""
        if self._key is None:
            return self._OPEN + value
        return self._SEALED + self._mark(self._key, context, value) + value

    def open(self, context: tuple[str, ...], closed: bytes) -> bytes:
        """The value of what was closed in this context.

        Raises:
            LLMLinkError: It was not, or not with this key.
        """
        kind, rest = closed[:1], closed[1:]
        if self._key is None and kind == self._OPEN:
            return rest
        if self._key is not None and kind == self._SEALED:
            size = hashlib.sha256().digest_size
            mark, value = rest[:size], rest[size:]
            if hmac.compare_digest(mark, self._mark(self._key, context, value)):
                return value
            fault = "a member has another link_secret, or a stranger writes into the meeting"
        elif self._key is None:
            fault = "another member has a link_secret, and this instance has none"
        else:
            fault = "this instance has a link_secret, and another member has none"
        raise error_for(LLMStatusCode.LLM_LINK_FAILED, fault, op="link", remedy=SHARE_IT)

    @staticmethod
    def _mark(key: bytes, context: tuple[str, ...], value: bytes) -> bytes:
        # Lengths before the parts: no two lists of parts may look the same.
        parts = [part.encode("utf-8", "surrogatepass") for part in context]
        text = b"".join(len(part).to_bytes(8, "big") + part for part in [*parts, value])
        return hmac.digest(key, text, "sha256")
