"""A small internet for tests: a network namespace behind a link, with servers at addresses of every kind.

The namespace of the test's own thread becomes the host: what is started from it (gateways, boxes) sees this internet
and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import ipaddress
import os
import socket
import ssl
import subprocess
import threading
from typing import TYPE_CHECKING

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CLONE_NEWNET = 0x40000000
HOST = "198.51.100.1"
GOOD, OTHER, NAMES = "198.51.100.10", "198.51.100.20", "198.51.100.53"
PRIVATE, METADATA = "10.9.0.5", "169.254.169.254"
HOST6, GOOD6 = "2001:db8:1::1", "2001:db8:1::10"
NOWHERE = "198.51.100.99"
ADDRESSES = {
    "good.test": [GOOD],
    "sub.good.test": [GOOD],
    "other.test": [OTHER],
    "private.test": [PRIVATE],
    "metadata.test": [METADATA],
    "loopback.test": ["127.0.0.1"],
    "host.test": [HOST],
    "nowhere.test": [NOWHERE],
    "big.test": [f"198.51.100.{number}" for number in range(100, 250)],
    "both.test": [GOOD, GOOD6],
}
_libc = ctypes.CDLL(None, use_errno=True)


class World:
    """The servers, and what they saw."""

    def __init__(self, pid: int, place: Path) -> None:
        self._pid = pid
        self.requests: list[str] = []
        self.names: list[str] = []
        self.queries: list[tuple[str, str]] = []
        self.datagrams: list[bytes] = []
        self.ca = place / "ca.pem"
        self._context = _tls(place, [*ADDRESSES])
        self.speak("h2", "http/1.1")
        self._context.sni_callback = lambda tls, name, context: self.names.append(name)

    def speak(self, *protocols: str) -> None:
        """What the servers speak under TLS from now on."""
        self._context.set_alpn_protocols(list(protocols))

    def reset(self) -> None:
        """Forget what was seen."""
        for seen in (self.requests, self.names, self.queries, self.datagrams):
            seen.clear()

    def open(self, family: int, kind: int, address: str, port: int) -> socket.socket:
        """Return a socket of the world, bound to an address there."""
        made: list[socket.socket | OSError] = []

        def work() -> None:
            try:
                with open(f"/proc/{self._pid}/ns/net", "rb") as namespace:
                    _check(_libc.setns(namespace.fileno(), CLONE_NEWNET))
                bound = socket.socket(family, kind)
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    bound.listen(1024)
                made.append(bound)
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def serve(self, address: str, port: int, handle: Callable[[socket.socket], None]) -> socket.socket:
        """Handle each connection to an address of the world in a thread."""
        listener = self.open(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, address, port)
        serve(listener, handle)
        return listener

    def nft(self, rules: str) -> None:
        """Have nft(8) do something there."""
        command = ["nsenter", "-t", str(self._pid), "-n", "--", "nft", "-f", "-"]
        subprocess.run(command, input=rules.encode(), check=True, timeout=10)

    def http(self, connection: socket.socket) -> None:
        """Answer each request with the one line ``SERVER HOST PATH``, and note it. Queries are not sent back: there
        may be a value in them."""
        own = connection.getsockname()[0]
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                piece = connection.recv(65536)
                if not piece:
                    return
                data += piece
            head, _, data = data.partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            length = int(headers.get("content-length", "0"))
            while len(data) < length:
                data += connection.recv(65536)
            body, data = data[:length], data[length:]
            self.requests.append(head.decode() + "\r\n\r\n" + body.decode(errors="replace"))
            text = f"{own} {headers.get('host', '-')} {_path(lines[0].split()[1])}\n".encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))

    def https(self, connection: socket.socket) -> None:
        """`http` under TLS, or HTTP/2 for those who ask for it."""
        with self._context.wrap_socket(connection, server_side=True) as tls:
            if tls.selected_alpn_protocol() == "h2":
                self.http2(tls)
            else:
                self.http(tls)

    def under_tls(self, connection: socket.socket, handle: Callable[[socket.socket], None]) -> None:
        """Speak something else under TLS."""
        with self._context.wrap_socket(connection, server_side=True) as tls:
            handle(tls)

    def http2(self, tls: ssl.SSLSocket) -> None:
        """Do as `http`, for all streams at once; a path that begins with ``/long`` is answered with 3 MiB."""
        server = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        server.initiate_connection()
        heads: dict[int, list[tuple[str, str]]] = {}
        bodies: dict[int, bytes] = {}
        answers: dict[int, bytes] = {}
        tls.sendall(server.data_to_send())
        while data := tls.recv(65536):
            for event in server.receive_data(data):
                match event:
                    case RequestReceived():
                        heads[event.stream_id] = [(str(name), str(value)) for name, value in event.headers]
                    case DataReceived():
                        bodies[event.stream_id] = bodies.get(event.stream_id, b"") + event.data
                        server.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    case StreamEnded():
                        head, body = heads.pop(event.stream_id), bodies.pop(event.stream_id, b"")
                        lines = "".join(f"{name}: {value}\n" for name, value in head)
                        self.requests.append(f"{lines}\n{body.decode(errors='replace')}")
                        fields = dict(head)
                        text = f"{tls.getsockname()[0]} {fields[':authority']} {_path(fields[':path'])}\n".encode()
                        answers[event.stream_id] = text if fields[":path"][:5] != "/long" else b"y" * (3 << 20)
                        server.send_headers(event.stream_id, [(":status", "200")])
                    case StreamReset():
                        answers.pop(event.stream_id, None)
            _send_answers(server, answers)
            tls.sendall(server.data_to_send())

    def echo_tls(self, connection: socket.socket) -> None:
        """Speak first, and then say everything again, under TLS: what no HTTP is."""
        with self._context.wrap_socket(connection, server_side=True) as tls:
            tls.sendall(b"welcome\n")
            while data := tls.recv(65536):
                self.requests.append(data.decode())
                tls.sendall(data)

    def start(self) -> list[socket.socket]:
        """Start all servers."""
        datagrams = []
        for address in (GOOD, OTHER, PRIVATE, METADATA, GOOD6):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            datagrams.append(self.open(family, socket.SOCK_DGRAM, address, 9999))
            threading.Thread(target=self._note_datagrams, args=(datagrams[-1],), daemon=True).start()
        names = self.open(socket.AF_INET, socket.SOCK_DGRAM, NAMES, 53)
        threading.Thread(target=self._answer, args=(names,), daemon=True).start()
        started = [*datagrams, names, self.serve(NAMES, 53, self._answer_stream), self.serve(GOOD, 7777, _echo)]
        started += [self.serve(address, 80, self.http) for address in (GOOD, OTHER, PRIVATE, METADATA, GOOD6)]
        started += [self.serve(address, 443, self.https) for address in (GOOD, OTHER)]
        started.append(self.serve(GOOD, 5555, self.echo_tls))
        return started

    def _note_datagrams(self, receiver: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, sender = receiver.recvfrom(65536)
                if not sender:  # it was shut down
                    return
                self.datagrams.append(data)
                receiver.sendto(data, sender)

    def _answer(self, receiver: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                wire, sender = receiver.recvfrom(65536)
                if not sender:
                    return
                response = self._respond(wire)
                if response is None:
                    continue
                if len(response.to_wire(max_size=65535)) > 1232:
                    response.answer.clear()
                    response.flags |= dns.flags.TC
                receiver.sendto(response.to_wire(), sender)

    def _answer_stream(self, connection: socket.socket) -> None:
        while size := connection.recv(2, socket.MSG_WAITALL):
            wire = connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
            response = self._respond(wire)
            if response is not None:
                answer = response.to_wire(max_size=65535)
                connection.sendall(len(answer).to_bytes(2, "big") + answer)

    def _respond(self, wire: bytes) -> dns.message.Message | None:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        name, kind = question.name.to_text(omit_final_dot=True).lower(), question.rdtype
        self.queries.append((name, dns.rdatatype.to_text(kind)))
        if name == "silent.test":
            return None
        response = dns.message.make_response(query, recursion_available=True)
        if name not in ADDRESSES:
            response.set_rcode(dns.rcode.NXDOMAIN)
        version = {dns.rdatatype.A: 4, dns.rdatatype.AAAA: 6}.get(kind, 0)
        found = [each for each in ADDRESSES.get(name, ()) if ipaddress.ip_address(each).version == version]
        if found:
            response.answer.append(dns.rrset.from_text_list(question.name, 1, "IN", kind, found))
        if kind == dns.rdatatype.TXT and name in ADDRESSES:
            response.answer.append(dns.rrset.from_text(question.name, 1, "IN", "TXT", '"some text"'))
        return response


@contextlib.contextmanager
def made(place: Path) -> Iterator[World]:
    """Move this thread into a namespace that has the world as its only neighbour."""
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    holder = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdin is not None
    holder.stdout.readline()
    started: list[socket.socket] = []
    try:
        _check(_libc.unshare(CLONE_NEWNET))
        inside = ["nsenter", "-t", str(holder.pid), "-n", "--"]
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "near", "type", "veth", "peer", "name", "far", "netns", str(holder.pid))
        _ip("addr", "add", f"{HOST}/24", "dev", "near")
        _ip("-6", "addr", "add", f"{HOST6}/64", "dev", "near", "nodad")
        _ip("link", "set", "near", "up")
        for command in (
            *(["link", "set", name, "up"] for name in ("lo", "far")),
            *(["addr", "add", f"{address}/32", "dev", "lo"] for address in (PRIVATE, METADATA)),
            *(["addr", "add", f"{address}/24", "dev", "far"] for address in (GOOD, OTHER, NAMES)),
            *(["addr", "add", f"198.51.100.{number}/32", "dev", "far"] for number in range(100, 104)),
            ["-6", "addr", "add", f"{GOOD6}/64", "dev", "far", "nodad"],
            ["route", "add", "default", "via", HOST],
        ):
            _ip(*command, inside=inside)
        _ip("route", "add", "default", "via", GOOD)
        _ip("-6", "route", "add", "default", "via", GOOD6)
        world = World(holder.pid, place)
        started = world.start()
        yield world
    finally:
        for each in started:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        with open(before, "rb") as namespace:
            _check(_libc.setns(namespace.fileno(), CLONE_NEWNET))
        holder.stdin.close()
        holder.wait(10)
        holder.stdout.close()


def serve(listener: socket.socket, handle: Callable[[socket.socket], None]) -> None:
    """Handle each connection to a listening socket in a thread, until it is shut down."""

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(30)
            handle(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def _path(target: str) -> str:
    return target.partition("?")[0]


def _ip(*words: str, inside: list[str] | None = None) -> None:
    subprocess.run([*(inside or []), "ip", *words], check=True, timeout=10)


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def _send_answers(server: H2Connection, answers: dict[int, bytes]) -> None:
    """Send as much as there is room for."""
    for number in list(answers):
        while number in answers and (room := min(server.local_flow_control_window(number), 16384)):
            piece, answers[number] = answers[number][:room], answers[number][room:]
            server.send_data(number, piece, end_stream=not answers[number])
            if not answers[number]:
                del answers[number]


def _tls(place: Path, names: list[str]) -> ssl.SSLContext:
    """A server's context with a certificate for the names; its authority's certificate is ``ca.pem``."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(own)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (place / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (place / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(place / "ca.pem", place / "key.pem")
    return context
