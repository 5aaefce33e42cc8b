"""How far a connection to the coordinator comes: name, TCP, TLS, certificate; one answer a step.

gRPC says "unavailable" for nearly everything that can go wrong on the way. So each step is tried by
itself, in the order of the network's layers, and the first that fails is the one to mend.
"""

from __future__ import annotations

import os
import socket
import ssl
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from medfl.client.premises import Home
from medfl.common import certificates

_STEP_S = 10.0
# OpenSSL's numbers of a certificate that is not yet, or no longer, valid.
_NOT_NOW = (9, 10)


@dataclass(frozen=True, slots=True)
class Step:
    """One step. todo: what to do where it failed, "" where it is done."""

    name: str
    said: str
    todo: str = ""


def steps(home: Home, environment: Mapping[str, str] = os.environ) -> Iterator[Step]:
    """DNS, TCP and TLS, each as it is done; the first that fails is the last. Sends nothing else.

    Raises:
        ConfigError, StorageError: the hospital's own keys cannot be read.
    """
    address = home.enrolment().address
    proxy = proxy_of(address, environment)
    host, port = _parts(address) if proxy is None else (proxy.hostname or "", proxy.port or 80)
    who = "the coordinator" if proxy is None else "the proxy"
    found = _resolved(host, port, who)
    yield found
    if found.todo:
        return
    with _connected(host, port) as tried:
        done = _tcp(tried, host, port, who)
        yield done
        if done.todo or isinstance(tried, OSError):
            return
        if proxy is not None:
            opened = _through(tried, proxy, address)
            yield opened
            if opened.todo:
                return
        yield _tls(tried, home, address)


def proxy_of(address: str, environment: Mapping[str, str]) -> SplitResult | None:
    """The HTTP proxy that gRPC takes for this address, None where it goes directly."""
    host = _parts(address)[0]
    names = ("grpc_proxy", "https_proxy", "http_proxy")
    text = next((environment[n] for n in names if environment.get(n)), "")
    around = (environment.get("no_grpc_proxy") or environment.get("no_proxy") or "").split(",")
    # Names are taken as endings, as gRPC does.
    if not text or any(end.strip() and host.endswith(end.strip()) for end in around):
        return None
    return urlsplit(text if "//" in text else f"http://{text}")


def _resolved(host: str, port: int, who: str) -> Step:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return Step(
            "name",
            f"the name of {who}, {host}, has no address here",
            "Check the spelling with the coordinator, and that this machine may ask a DNS server "
            "for outside names.",
        )
    number = str(found[0][4][0])
    return Step("name", f"{host} is {number}" if host != number else f"{host} needs none")


@contextmanager
def _connected(host: str, port: int) -> Iterator[socket.socket | OSError]:
    try:
        made = socket.create_connection((host, port), timeout=_STEP_S)
    except OSError as error:
        yield error
        return
    with made:
        yield made


def _tcp(tried: socket.socket | OSError, host: str, port: int, who: str) -> Step:
    if isinstance(tried, socket.socket):
        return Step("tcp", f"{who} answers at port {port}")
    if isinstance(tried, ConnectionRefusedError):
        return Step(
            "tcp",
            f"{host} refuses connections to port {port}",
            "Its machine is there and no server listens: ask the coordinator whether medfl-server "
            "runs and the port is right.",
        )
    return Step(
        "tcp",
        f"no connection to {host} port {port} ({tried.strerror or 'no answer in time'})",
        f"Ask the firewall's keeper for one outbound TCP connection to {host}:{port}; or, where "
        "this hospital has an HTTP proxy, set https_proxy.",
    )


def _through(tried: socket.socket, proxy: SplitResult, address: str) -> Step:
    """Ask the proxy for a tunnel (RFC 9110, section 9.3.6)."""
    asked = f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n"
    if proxy.username:
        pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        asked += f"Proxy-Authorization: Basic {b64encode(pair.encode()).decode()}\r\n"
    try:
        tried.sendall(f"{asked}\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head and len(head) < 65536:
            piece = tried.recv(1)  # a byte more would be TLS's
            if not piece:
                break
            head += piece
    except OSError:
        head = b""
    status = head.split(b"\r\n")[0].decode("latin-1")
    code = status.split()[1:2]
    if code == ["200"]:
        return Step("proxy", "the proxy lets through to the coordinator")
    todo = (
        "It wants a name and password: https_proxy=http://NAME:PASSWORD@HOST:PORT"
        if code == ["407"]
        else f"Ask its keeper to allow CONNECT to {address}."
    )
    return Step("proxy", f"the proxy does not let through ({status[:60] or 'no answer'})", todo)


def _tls(tried: socket.socket, home: Home, address: str) -> Step:
    authority = home.authority()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=certificates.pem_of(authority))
    context.load_cert_chain(home.identity_file)
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(tried, server_hostname=certificates.server_name(authority)):
            return Step("tls", "TLS 1.3 with this federation's coordinator")
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _NOT_NOW:
            return Step(
                "tls",
                "the coordinator's certificate is not valid by this machine's clock",
                "Compare the clocks; if they agree, tell the coordinator to run: medfl-server "
                "renew",
            )
        return Step(
            "tls",
            f"what answers at {address} is not the coordinator of this federation",
            "A proxy that opens TLS must let this address through unopened. If there is none, "
            "check the address, and telephone the coordinator.",
        )
    except OSError as error:  # an SSLError is one
        reason = getattr(error, "reason", None) or error.strerror or "cut off"
        return Step(
            "tls",
            f"what answers at {address} does not speak TLS 1.3 ({reason})",
            "Check the port. A proxy or firewall that opens TLS must let this address through "
            "unopened.",
        )


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
