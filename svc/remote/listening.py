"""Addresses that a command of ours listens on: their URL, and why they cannot be had."""

import errno
import ipaddress
import socket

from svc.errors import BusyError, SettingsError, SvcError


def address_family(host: str) -> socket.AddressFamily:
    """IPv6 for an address that has a colon, else IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there. A name is none, but for localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def http_url(host: str, port: int, *, tls: bool = False) -> str:
    """The URL of a server there."""
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def listen_error(host: str, port: int, error: OSError | UnicodeError) -> SvcError:
    """What to tell of an address that could not be bound: BusyError for a port in use, else SettingsError."""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return BusyError(f"port {port} on {host} is in use", todo="end its owner, or choose another: --port")
    return SettingsError(
        f"cannot listen on {host}:{port}: {getattr(error, 'strerror', error)}", todo="correct --host, --port"
    )
