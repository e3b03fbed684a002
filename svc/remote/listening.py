"""Helpers for addresses that a command listens on: their URLs, and errors from binding them."""

import errno
import ipaddress
import socket

from svc.errors import BusyError, SettingsError, SvcError


def address_family(host: str) -> socket.AddressFamily:
    """Return the address family: IPv6 if the address contains a colon, otherwise IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def is_loopback(host: str) -> bool:
    """Return whether an address is a loopback address. Among host names, only `localhost` is treated as
    loopback.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def http_url(host: str, port: int, *, tls: bool = False) -> str:
    """Return the URL of a server at the given address."""
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def listen_error(host: str, port: int, error: OSError | UnicodeError) -> SvcError:
    """Return the error for an address that cannot be bound: BusyError if the port is in use, else SettingsError."""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        todo = "stop the process that uses the port, or choose another with --port"
        return BusyError(f"port {port} on {host} is in use", todo=todo)
    return SettingsError(
        f"cannot listen on {host}:{port}: {getattr(error, 'strerror', error)}", todo="correct --host or --port"
    )
