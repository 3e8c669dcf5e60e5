"""Parsers of option values. Each takes what was typed and raises ValueError saying what would be right."""

from __future__ import annotations

import ipaddress
import math
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?", re.ASCII)
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_HOST_PATH = ("/", "./", "../", "~")


class PublishOption(NamedTuple):
    """``-p [[ADDRESS:]HOST_PORT:]PORT[/udp]``; ``host_port`` 0: one that is free."""

    port: int
    host_port: int
    host_ip: str
    protocol: str = "tcp"


class MountOption(NamedTuple):
    """``-v SOURCE:TARGET[:ro|rw]``; exactly one of ``source`` (host path) and ``volume`` is not empty."""

    source: str
    volume: str
    target: str
    read_only: bool


def memory(text: str) -> int:
    """``512m``, ``2g``, or a plain number of MiB → MiB, rounded up."""
    size = _size(text, 1 << 20, "512m or 2g")
    return -(-size // (1 << 20))


def disk(text: str) -> int:
    """``10g``, or a plain number of GB → GB, rounded up."""
    return -(-_size(text, 1 << 30, "10g") // (1 << 30))


def rate(text: str) -> int:
    """``500k``, ``2m``, or a plain number of bytes, a second; ``none`` → 0."""
    return 0 if text == "none" else _size(text, 1, "500k or 2m, or none")


def _size(text: str, unit: int, example: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    size = math.ceil(float(match[1]) * _UNITS.get(match[2].lower(), unit)) if match else 0
    if not 0 < size < 1 << 60:
        raise ValueError(f"{text!r} is not a size; write e.g. {example}")
    return size


def cpus(text: str) -> int:
    """A whole number of CPUs, at least 1."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 1024:
        raise ValueError(f"{text!r} is not a number of CPUs; write a whole number from 1 on")
    return int(text)


def count(text: str) -> int:
    """A whole number, 0 included."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def duration(text: str) -> float:
    """``30``, ``1.5s``, ``500ms``, ``5m``, ``1h`` → seconds."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a time; write e.g. 30, 500ms, 5m or 1h")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def this_machine(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def signum(text: str) -> int:
    """``TERM``, ``SIGTERM`` or ``15`` → 15."""
    if text.isascii() and text.isdigit() and 1 <= int(text) <= 64:
        return int(text)
    name = text.upper().removeprefix("SIG")
    try:
        return signal.Signals[f"SIG{name}"].value
    except KeyError:
        raise ValueError(f"{text!r} is not a signal; write e.g. TERM or 15") from None


def env(text: str) -> tuple[str, str] | None:
    """``NAME=VALUE``; ``NAME`` alone takes the caller's value (`None` when there is none)."""
    name, equals, value = text.partition("=")
    if not name:
        raise ValueError(f"{text!r} has no name; write NAME=VALUE")
    if equals:
        return name, value
    return (name, os.environ[name]) if name in os.environ else None


def env_file(text: str) -> list[tuple[str, str]]:
    """A file of ``NAME=VALUE`` lines; empty lines and lines that start with ``#`` are skipped."""
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {text!r}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    pairs = []
    for number, line in enumerate(content.split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            pair = env(line.lstrip())
        except ValueError as error:
            raise ValueError(f"{text}, line {number}: {error}") from None
        if pair:
            pairs.append(pair)
    return pairs


def label(text: str) -> tuple[str, str]:
    """``KEY=VALUE``; ``KEY`` alone has an empty value."""
    key, _, value = text.partition("=")
    if not key:
        raise ValueError(f"{text!r} has no key; write KEY=VALUE")
    return key, value


def publish(text: str) -> PublishOption:
    """``80``, ``8080:80``, ``127.0.0.1:8080:80``, ``[::1]:8080:80``, ``5353:53/udp``."""
    pattern = r"(?:(?:(\[[0-9a-fA-F:]+\]|[0-9.]+):)?(\d{0,5}):)?(\d{1,5})(?:/(tcp|udp))?"
    match = re.fullmatch(pattern, text, re.ASCII)
    if match is None or not 1 <= int(match[3]) <= 65535 or int(match[2] or 0) > 65535:
        raise ValueError(
            f"{text!r} is not [[ADDRESS:]HOST_PORT:]PORT[/udp]; write e.g. 80, 8080:80, [::1]:8080:80 or 5353:53/udp"
        )
    address = (match[1] or "127.0.0.1").strip("[]")
    return PublishOption(int(match[3]), int(match[2] or 0), address, match[4] or "tcp")


class SecretOption(NamedTuple):
    """``--secret NAME[=VALUE]@HOST,…``."""

    name: str
    value: str
    hosts: tuple[str, ...]

    def __repr__(self) -> str:
        return f"SecretOption({self.name!r})"


def secret(text: str) -> SecretOption:
    """``NAME=VALUE@host,…``; ``NAME@host,…`` takes the value from the caller's environment."""
    pair, at, hosts = text.rpartition("@")
    name, equals, value = pair.partition("=")
    if not at or not name or not hosts:
        raise ValueError("a secret is NAME=VALUE@HOST,… or, with the value from the environment, NAME@HOST,…")
    if not equals and name not in os.environ:
        raise ValueError(f"{name} is not set in the environment; write NAME=VALUE@HOST,…")
    return SecretOption(name, value if equals else os.environ[name], tuple(hosts.split(",")))


def mount(text: str) -> MountOption:
    """``SOURCE:TARGET[:ro|rw]``. A source that begins with ``/ ./ ../ ~`` is a host path that must exist,
    any other a managed volume."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[0] or not parts[1].startswith("/"):
        raise ValueError(f"{text!r} is not SOURCE:TARGET[:ro|rw] with an absolute TARGET")
    source, target = parts[:2]
    mode = parts[2] if len(parts) == 3 else "rw"
    if mode not in ("ro", "rw"):
        raise ValueError(f"{text!r}: the only modes are ro and rw, not {mode!r}")
    if source not in (".", "..") and not source.startswith(_HOST_PATH):
        return MountOption("", source, target, mode == "ro")
    try:
        path = Path(source).expanduser().resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"the host path {source!r} cannot be used: {getattr(error, 'strerror', error)}") from None
    return MountOption(str(path), "", target, mode == "ro")
