"""Connects this process to a Ray cluster for the duration of a `with` block, to train or to start engines on it."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from urllib.parse import urlsplit

from svc.errors import ServerNotRunningError, SettingsError

_CONNECT_S = 3.0
_ADDRESS = "RAY_ADDRESS"
_JOIN = "ray start --address={}"


def find_address(setting: str | None) -> str:
    """Return the address of the Ray cluster, from the setting or else from the environment.

    Raises:
        SettingsError: neither of them is set, or the value is not the address of a cluster.
    """
    address = setting or os.environ.get(_ADDRESS, "")
    if not address:
        raise SettingsError(
            "the address of the Ray cluster is not set",
            expected="ray.address or the variable RAY_ADDRESS with an address such as head:6379 or ray://head:10001",
            todo="set ray.address in svc.yaml to the address that `ray start --head` printed",
        )
    if urlsplit(address).scheme in ("http", "https"):
        raise SettingsError(
            f"{address} is the address of Ray's dashboard",
            expected="the address of the cluster, such as head:6379 or ray://head:10001",
            todo="set ray.address, which overrides RAY_ADDRESS",
        )
    return address


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect this process to a cluster for the duration of the `with` block.

    Non-detached actors started in the block are stopped when it ends.

    Raises:
        SettingsError: Ray is not installed.
        ServerNotRunningError: the cluster cannot be reached, or rejects the connection.
    """
    try:
        import ray
    except ImportError as error:
        raise SettingsError("Ray is not installed", todo="pip install 'tuneserve[ray]'") from error
    _check_reachable(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, namespace="tuneserve")
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ServerNotRunningError(
            f"cannot join the Ray cluster at {address}: {reason}",
            expected="a node of the cluster, with the same versions of Python and Ray as the cluster, and the "
            "cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token",
            todo=f"run `{_JOIN.format(address)}` on this machine, or set ray.address to ray://HEAD:10001",
        ) from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has replaced it
        with redirect_stdout(sys.stderr):  # Ray prints events, such as a lost node, and stdout is for the result
            yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise ServerNotRunningError if nothing listens at the address. Ray itself would retry for half a minute."""
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        if place.hostname is None or place.port is None:  # such as `auto`
            return
        socket.create_connection((place.hostname, place.port), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ServerNotRunningError(
            f"no Ray cluster answers at {address}: {error}",
            expected="a running cluster",
            todo="check ray.address or RAY_ADDRESS, and start the cluster: ray start --head",
        ) from error
