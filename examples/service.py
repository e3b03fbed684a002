"""`svc` as a user runs it: commands, and a server in the background that is ended with the context."""

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
_ENDS_S = 60.0  # a server lets its requests end, training writes a checkpoint


class Terminated(KeyboardInterrupt):
    """SIGTERM came, which reaches this process alone; Ctrl-C reaches those that it started too."""

    @classmethod
    def on_sigterm(cls) -> None:
        """From now on SIGTERM raises it."""

        def terminated(*_: object) -> None:
            raise cls

        signal.signal(signal.SIGTERM, terminated)


def svc(home: Path, *arguments: str, capture_output: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs one command on a home. Where this is interrupted, the command ends first, and keeps what it then saves."""
    to = subprocess.PIPE if capture_output else None
    command = [str(_SVC), "--home", str(home), *arguments]
    with subprocess.Popen(command, text=True, stdout=to, stderr=to) as child:
        try:
            out, err = child.communicate()
        except BaseException as error:
            if isinstance(error, Terminated) or not isinstance(error, KeyboardInterrupt):
                child.terminate()  # Ctrl-C it has heard itself, and would end at once where it hears twice
            try:
                child.communicate(timeout=_ENDS_S)
            except subprocess.TimeoutExpired:
                child.kill()
            raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def svc_json(home: Path, *arguments: str) -> Any:
    """Runs one command that must succeed, and returns what it prints with --json.

    Raises:
        RuntimeError: it failed; holds what it said.
    """
    done = svc(home, *arguments, "--json", capture_output=True)
    if done.returncode:
        raise RuntimeError(f"svc {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)


@contextmanager
def serving(
    home: Path, model: str, port: int, *, timeout_s: float = 300, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Runs `svc serve` for the body; yields its URL when it answers.

    Args:
        environment: variables beside those of this process, as settings.

    Raises:
        RuntimeError: it ended before it was ready; holds the end of its log.
    """
    log = home / "logs" / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        command = [str(_SVC), "--home", str(home), "serve", model, "--port", str(port)]
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
    """Returns when /health says ready.

    Raises:
        RuntimeError: the server ended, or was not ready in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server and server.poll() is not None:
            raise RuntimeError(f"svc serve ended with {server.returncode}:\n{log.read_text('utf-8')[-2000:]}")
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{url} was not ready after {timeout_s:.0f} s:\n{log.read_text('utf-8')[-2000:]}")


def engine_pid(home: Path) -> int:
    """The process id of vLLM behind a home's server, of its first replica, for killing it."""
    from svc.engine.orphans import find_engine
    from svc.engine.vllm.folders import state_folders

    found = [find_engine(folder) for folder in state_folders(home).values()]
    return next(engine.pid for engine in found if engine is not None)
