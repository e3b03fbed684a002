"""Tests that the systemd units are consistent with each other and with the server's behaviour."""

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from serving.server import systemd_notify
from svc.errors import NotFoundError, SettingsError
from svc.settings.load import load_settings
from svc.settings.settings import Settings
from tests.deploy.deploy_files import grace_s
from tests.docs.pages import ROOT
from tests.docs.svc_usage import usage_error

FOLDER = ROOT / "deploy" / "systemd"
SERVICES = sorted(FOLDER.glob("*.service"))
UNITS = sorted([*SERVICES, *FOLDER.glob("*.socket"), *FOLDER.glob("*.timer")])
MAX_EXPOSURE = 20
"""Maximum exposure in tenths of the `systemd-analyze security` score, which calls less than 25 OK."""
_EXECUTABLE = re.compile(r"/opt/tuneserve/\.venv/bin/svc")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")


def unit(name: str) -> dict[str, dict[str, str]]:
    """Return the sections of a systemd unit, with repeated keys joined by newlines."""
    sections: dict[str, dict[str, str]] = {}
    for line in (FOLDER / name).read_text("utf-8").splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section[key] = f"{section[key]}\n{value}" if key in section else value
    return sections


def runnable(folder: Path) -> None:
    """Create copies of the units whose program exists on every machine."""
    for path in UNITS:
        (folder / path.name).write_text(_EXECUTABLE.sub("/bin/true", path.read_text("utf-8")), "utf-8")


@needs_systemd
def test_systemd_verifies_the_unit_files(tmp_path: Path) -> None:
    runnable(tmp_path)
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *(path.name for path in UNITS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if "tuneserve" in line]
    assert (done.returncode, ours) == (0, [])


@needs_systemd
def test_systemd_security_analysis_rates_the_exposure_of_every_unit_as_ok() -> None:
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={MAX_EXPOSURE}", *map(str, SERVICES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Overall exposure level") == len(SERVICES)


def test_stopping_the_systemd_unit_kills_only_the_server_process() -> None:
    service = unit("tuneserve.service")["Service"]
    assert (service["KillMode"], service["KillSignal"]) == ("process", signal.SIGUSR1.name)
    assert service["OOMPolicy"] == "continue"  # an engine killed for its memory does not stop the server
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service.get("PrivateTmp", "no") == "no"


def test_systemd_stop_timeout_allows_running_requests_to_finish() -> None:
    assert int(unit("tuneserve.service")["Service"]["TimeoutStopSec"]) > 2 * grace_s()


def test_start_and_watchdog_timeouts_exceed_the_notification_interval() -> None:
    service = unit("tuneserve.service")["Service"]
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) > 3 * systemd_notify._BEAT_S
    assert int(service["TimeoutStartSec"]) >= systemd_notify._PATIENCE_S


def test_systemd_unit_is_not_restarted_after_a_permanent_error() -> None:
    server, monitor = (unit(name)["Service"] for name in ("tuneserve.service", "tuneserve-monitor.service"))
    assert server["RestartPreventExitStatus"] == f"{SettingsError.exit_code} {NotFoundError.exit_code}"
    assert monitor["RestartPreventExitStatus"] == str(SettingsError.exit_code)


def test_socket_unit_listens_on_the_servers_default_address() -> None:
    host, _, port = unit("tuneserve.socket")["Socket"]["ListenStream"].rpartition(":")
    assert (host, int(port)) == (Settings().serve.host, Settings().serve.port)


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_every_systemd_unit_runs_an_existing_command_with_existing_settings(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = unit(path.name)["Service"]
    program, *words = service["ExecStart"].split()
    assert program.endswith("/bin/svc")
    assert usage_error(words) is None
    for line in service["Environment"].splitlines():
        variable, _, value = line.partition("=")
        monkeypatch.setenv(variable, value)
    settings = load_settings(FOLDER / "svc.yaml")
    assert settings.home == Path(f"/var/lib/{service['StateDirectory']}")
    assert settings.base_cache.is_relative_to(f"/var/cache/{service['CacheDirectory']}")


def test_server_and_exporter_run_as_the_same_user_with_the_same_folders_and_environment() -> None:
    of = [unit(name)["Service"] for name in ("tuneserve.service", "tuneserve-monitor.service")]
    for key in ("User", "Environment", "RuntimeDirectory", "WorkingDirectory"):
        assert of[0][key] == of[1][key]
