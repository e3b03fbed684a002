"""Runs `svc` as a user would: commands, and a server in the background while a context is active."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

_SVC = Path(sys.executable).with_name("svc")
_ENDS_S = 60.0  # a server completes its requests, training writes a checkpoint


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which reaches only this process. Ctrl-C also reaches its children."""

    @classmethod
    def on_sigterm(cls) -> None:
        """Install a SIGTERM handler that raises this exception."""

        def terminated(*_: object) -> None:
            raise cls

        signal.signal(signal.SIGTERM, terminated)


def svc(home: Path, *arguments: str, capture_output: bool = False) -> subprocess.CompletedProcess[str]:
    """Run one command with a home. When interrupted, give it up to a minute to save its work and stop."""
    to = subprocess.PIPE if capture_output else None
    command = [str(_SVC), "--home", str(home), *arguments]
    with subprocess.Popen(command, text=True, stdout=to, stderr=to) as child:
        try:
            out, err = child.communicate()
        except BaseException as error:
            if isinstance(error, Terminated) or not isinstance(error, KeyboardInterrupt):
                child.terminate()  # Ctrl-C reaches the child itself, and a second signal would stop it immediately
            try:
                child.communicate(timeout=_ENDS_S)
            except subprocess.TimeoutExpired:
                child.kill()
            raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def svc_json(home: Path, *arguments: str) -> Any:
    """Run one command that must succeed, and return its parsed --json output.

    Raises:
        RuntimeError: the command failed; the message contains its error output.
    """
    done = svc(home, *arguments, "--json", capture_output=True)
    if done.returncode:
        raise RuntimeError(f"svc {' '.join(arguments)} exited with code {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)


@contextmanager
def serving(
    home: Path, model: str | None, port: int, *, timeout_s: float = 300, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run `svc serve` while the context is active, and yield its URL once it is ready.

    Args:
        model: the model to serve, or None for those that were served last.
        timeout_s: maximum time until the server is ready.
        environment: additional environment variables, such as settings.

    Raises:
        RuntimeError: the server stopped or was not ready in time; the message includes the end of its log.
    """
    log = home / "logs" / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        command = [str(_SVC), "--home", str(home), "serve", *([model] if model else []), "--port", str(port)]
        server = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=os.environ | dict(environment or {})
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server, log, timeout_s)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def wait_until_ready(url: str, server: "subprocess.Popen[bytes] | None", log: Path, timeout_s: float) -> None:
    """Wait until the server's /health reports success.

    Args:
        server: process of the server, if this process started it.
        log: the server's log, for error messages.

    Raises:
        RuntimeError: the server stopped or was not ready in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server and server.poll() is not None:
            raise RuntimeError(f"svc serve exited with code {server.returncode}:\n{log.read_text('utf-8')[-2000:]}")
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{url} was not ready after {timeout_s:.0f} s:\n{log.read_text('utf-8')[-2000:]}")


def engine_pid(home: Path) -> int:
    """Return the id of the first vLLM process running for a home."""
    from svc.engine.orphans import find_engine
    from svc.engine.vllm.folders import state_folders

    engines = [find_engine(folder) for folder in state_folders(home).values()]
    return next(engine.pid for engine in engines if engine is not None)
