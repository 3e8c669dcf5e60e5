"""Ends of conversations that the gateway reads along: who waits for one that is closed here is woken, and nobody else
is confused."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl

import anyio
import pytest

from hutch.net.authority import Impersonator, create
from hutch.net.link import PlainLink, TlsLink

pytestmark = pytest.mark.anyio


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


async def test_bytes_pass_however_long_they_take() -> None:
    ours, theirs = _pair()
    near, far = PlainLink(ours), PlainLink(theirs)
    data, got = os.urandom(8 << 20), b""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(near.send, data)
        while len(got) < len(data):
            got += await far.receive()
    assert got == data
    await near.end()
    assert await far.receive() == b""
    near.close()
    far.close()


@pytest.mark.parametrize("way", ["receive", "send"])
async def test_who_waits_for_a_link_that_is_closed_is_woken(way: str) -> None:
    """And the next connection, which has the same number, is waited for as any other."""
    ours, theirs = _pair()
    link = PlainLink(ours)
    number = ours.fileno()
    work = link.receive() if way == "receive" else link.send(bytes(64 << 20))
    waiting = asyncio.ensure_future(work)
    await asyncio.sleep(0)
    link.close()
    theirs.close()
    again, peer = _pair()
    if again.fileno() != number:
        os.dup2(again.fileno(), number)
        again.close()
        again = socket.socket(fileno=number)
    next_link = PlainLink(again)
    with anyio.fail_after(5):
        receiving = asyncio.ensure_future(next_link.receive())
        await asyncio.sleep(0)
        with pytest.raises(ConnectionAbortedError):
            await waiting
        await asyncio.get_running_loop().sock_sendall(peer, b"hello")
        assert await receiving == b"hello"
    next_link.close()
    peer.close()


@pytest.mark.parametrize("in_order", [True, False])
async def test_a_link_that_is_not_closed_in_order_is_a_reset(in_order: bool) -> None:
    ours, theirs = _pair()
    link, peer = PlainLink(ours), PlainLink(theirs)
    await link.send(b"part")
    assert await peer.receive() == b"part"
    if in_order:
        link.close()
        assert await peer.receive() == b""
    else:
        link.abort()
        with pytest.raises(ConnectionResetError):
            await peer.receive()
    peer.close()


@pytest.mark.parametrize("announced", [True, False])
async def test_an_end_that_tls_does_not_announce_is_none(announced: bool) -> None:
    """Whatever the version of Python makes of one."""
    authority = create("box")
    server = Impersonator(authority).context("good.test", "http/1.1")
    client = ssl.create_default_context(cadata=authority.certificate)
    client.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    ours, theirs = _pair()
    near, far = TlsLink(PlainLink(ours), client, server_name="good.test"), TlsLink(PlainLink(theirs), server)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(far.handshake)
        await near.handshake()
    await far.send(b"part")
    assert await near.receive() == b"part"
    if announced:
        await far.end()
        assert await near.receive() == b""
    else:
        far.close()
        with pytest.raises(ssl.SSLError):
            await near.receive()
    near.close()
    far.close()
