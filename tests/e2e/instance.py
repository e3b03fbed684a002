"""A separate server on a copy of the trained home, which can be killed with or without its engines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from sqlalchemy import Engine as Store

from examples.load import Load
from examples.service import svc, svc_json, wait_until_ready
from svc.engine.orphans import find_engine, runs
from svc.engine.vllm.folders import state_folders
from svc.registry.manifest import MANIFEST_FILE
from svc.registry.registry import Registry
from svc.settings.load import load_settings
from svc.settings.settings import Settings
from svc.store.database import open_store
from svc.version import VersionId
from tests.e2e.server import of_one_model

Prompts = list[list[dict[str, str]]]

ANY_QUALITY = ("--force", "--reason", "a test of swaps")
"""Options of `svc promote` with which gates refuse nothing."""


class Instance:
    """`svc serve` running on its own copy of a home.

    Args:
        home: home to copy.
        folder: folder of the copy.
        settings: environment variables.

    Attributes:
        headers: headers of requests to the server; they include a key if the home has any.
        core: the only CPU core that the server and its engines use, or None for all.
    """

    def __init__(self, home: Path, folder: Path, port: int, prompts: Prompts, **settings: str) -> None:
        shutil.copytree(home, folder, ignore=shutil.ignore_patterns("runs", "logs", "*.lock"))
        (folder / "logs").mkdir()
        self.home = folder
        self.url = f"http://127.0.0.1:{port}"
        self.prompts = prompts
        self.headers: dict[str, str] = {}
        self._port = port
        self.core: int | None = None
        self.settings = {"SVC_HOLDOUT__EVERY_HOURS": "0"} | settings
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *models: str) -> float:
        """Start the server and return the number of seconds until one of its models was ready.

        Args:
            models: models to serve; by default `tiny`.
        """
        began = time.monotonic()
        wait_until_ready(self.url, self.launch(*models), self._log, 300)
        return time.monotonic() - began

    def store(self) -> Store:
        """Open the server's store."""
        return open_store(load_settings(home=self.home))

    @property
    def _log(self) -> Path:
        return self.home / "logs" / "serve.log"

    def launch(self, *models: str) -> "subprocess.Popen[bytes]":
        """Start the server without waiting until it is ready."""
        command = [Path(sys.executable).with_name("svc"), "--home", self.home, "serve", *(models or ("tiny",))]
        command += ["--port", self._port]
        if self.core is not None:
            command = ["taskset", "--cpu-list", self.core, *command]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=os.environ | self.settings,
            )
        return self._process

    @property
    def is_running(self) -> bool:
        """Whether the server's process is running."""
        return self._process is not None and self._process.poll() is None

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop the server and return its exit code. SIGKILL leaves its engines running."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(120)

    def close(self) -> None:
        """Stop the server and any remaining engines."""
        if self._process is not None and self._process.poll() is None:
            self.end()
        for engine in self.engines():
            for process in group(engine):
                process.kill()

    def said(self) -> str:
        """Return the server's output, including output from before its last start."""
        return self._log.read_text("utf-8")

    def models(self) -> dict[str, Any]:
        """Return the status of each model, keyed by name."""
        status = httpx.get(f"{self.url}/svc/status", headers=self.headers, timeout=10, trust_env=False).json()
        return {model["model"]: model for model in status["models"]}

    def all_ready(self, *names: str, timeout_s: float = 240) -> None:
        """Wait until exactly these models are serving."""
        deadline = time.monotonic() + timeout_s
        while (states := {name: model["engine"]["state"] for name, model in self.models().items()}) != dict.fromkeys(
            names, "ready"
        ):
            assert time.monotonic() < deadline, states
            time.sleep(0.1)

    def until_all(self, condition: Callable[[str], bool], timeout_s: float = 240) -> None:
        """Wait until the engines of every model are in a state that meets the condition."""
        deadline = time.monotonic() + timeout_s
        while not all(condition(model["engine"]["state"]) for model in self.models().values()):
            assert time.monotonic() < deadline, self.models()
            time.sleep(0.1)

    def process(self) -> psutil.Process:
        """Return the server's process."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def engines(self) -> list[psutil.Process]:
        """Return the first process of each vLLM engine, in replica order."""
        return list(self.engines_by_replica().values())

    def engines_by_replica(self) -> dict[int, psutil.Process]:
        """Return the first process of each vLLM engine, keyed by replica number."""
        engines = {number: find_engine(folder) for number, folder in state_folders(self.home).items()}
        return {number: engine for number, engine in engines.items() if engine is not None}

    def engines_of(self, model: str) -> list[psutil.Process]:
        """Return the first process of each of a model's vLLM engines."""
        engines = self.engines_by_replica()
        return [engines[one["replica"]] for one in self.models()[model]["engines"] if one["replica"] in engines]

    def status(self) -> Any:
        """Return the status of the server merged with that of its first model."""
        return of_one_model(
            httpx.get(f"{self.url}/svc/status", headers=self.headers, timeout=10, trust_env=False).json()
        )

    def until(self, condition: Callable[[Any], object], timeout_s: float = 240) -> Any:
        """Wait until the status meets a condition, polling a hundred times per second."""
        deadline = time.monotonic() + timeout_s
        with httpx.Client(base_url=self.url, headers=self.headers, timeout=10, trust_env=False) as client:
            while time.monotonic() < deadline:
                status = of_one_model(client.get("/svc/status").json())
                if condition(status):
                    return status
                time.sleep(0.01)
        raise AssertionError(f"not so after {timeout_s} s: {status}")

    def long_answer(self, *, again: bool = False) -> "subprocess.Popen[bytes]":
        """Run a client that reads one long answer, or several in succession if `again` is set."""
        body = '{"model": "tiny", "prompt": "a", "max_tokens": 900, "stream": true, "ignore_eos": true}'
        ask = f"curl -sN {self.url}/v1/completions -H 'content-type: application/json' -d '{body}'"
        command = f"while {ask}; do :; done" if again else ask
        client = subprocess.Popen(["bash", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.until(lambda status: status["requests"]["running"])
        return client

    def answers(self, model: str = "tiny") -> list[tuple[str, str]]:
        """Return the answering version and the text for each prompt."""
        answers = []
        for prompt in self.prompts:
            body = {"model": model, "messages": prompt, "max_tokens": 24, "temperature": 0}
            answer = httpx.post(
                f"{self.url}/v1/chat/completions", json=body, headers=self.headers, timeout=120, trust_env=False
            )
            answer.raise_for_status()
            text = answer.json()["choices"][0]["message"]["content"]
            answers.append((answer.headers["x-model-version"], text))
        return answers

    def promote(self, *arguments: str) -> Any:
        """Run `svc promote`, which must succeed; a worse version, too, so that tests can go back and forth."""
        return svc_json(self.home, "promote", *arguments, *ANY_QUALITY)

    def try_to_promote(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """Run `svc promote` in the background, whatever its result."""
        command = [Path(sys.executable).with_name("svc"), "--home", self.home, "promote", *arguments, *ANY_QUALITY]
        return subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a `svc` command on the instance's home."""
        return svc(self.home, *arguments, capture_output=True)


def copy_model(home: Path, name: str) -> None:
    """Register all versions of `tiny` under another name."""
    registry = Registry.of(Settings(home=home))
    for version in registry.versions("tiny"):
        copy_version(registry, version, name)


def copy_versions(home: Path, count: int) -> None:
    """Register the versions of `tiny` again, in turn, until there are `count` versions."""
    registry = Registry.of(Settings(home=home))
    versions = registry.versions("tiny")
    for number in range(len(versions), count):
        copy_version(registry, versions[number % len(versions)], "tiny")


def copy_version(registry: Registry, version: VersionId, name: str) -> None:
    """Copy a version. All files except the manifest are hard-linked, because they never change."""
    manifest = json.loads((registry.folder(version) / MANIFEST_FILE).read_text("utf-8"))
    copied = registry.tracking.allocate(name, str(registry.folder(version)), manifest["tracking_run"])
    folder = shutil.copytree(registry.folder(version), registry.folder(copied), copy_function=os.link)
    folder.chmod(0o755)
    (folder / MANIFEST_FILE).unlink()
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"name": name, "number": copied.number}), "utf-8")


def group(engine: psutil.Process) -> list[psutil.Process]:
    """Return an engine's processes, starting with the first one."""
    members = [process for process in psutil.process_iter() if _group_id(process.pid) == engine.pid]
    return sorted(members, key=lambda process: process.pid != engine.pid)


def core_of(engine: psutil.Process) -> psutil.Process:
    """Return the process that runs vLLM's engine core. On a CPU it is forked by one that has imported vLLM."""
    members = group(engine)
    importers = {process.pid for process in members if process.ppid() == engine.pid}
    return next(process for process in members if process.ppid() in importers)


def _group_id(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def figures(load: Load, swap: Any) -> str:
    """Describe how a swap under load affected the clients."""
    seconds = [answer.seconds for answer in load.answers]
    queued = "none" if swap["queued"] is None else f"{swap['queued']} for {swap['queued_s']:.2f} s"
    return (
        f"{swap['kind']}: {swap['took_s']:.1f} s, {swap['running']} running, queued {queued}; {len(seconds)} answers, "
        f"longest extra wait {max(seconds) - median(seconds):.2f} s, {len(load.failed)} failed"
    )


def is_engine(process: psutil.Process) -> bool:
    """Return whether a process is a running vLLM process."""
    try:
        line = " ".join(process.cmdline())
        return runs(process) and ("vllm.entrypoints" in line or line.startswith("VLLM::"))
    except psutil.Error:
        return False
