"""Tests that the startup phase is the latest one found in the engine's log."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.engine.state import EnginePhase
from svc.engine.vllm.process import PhaseReader

LINES = {
    # As vLLM 0.32 writes them on a CPU.
    EnginePhase.ARGUMENTS: "(APIServer pid=1) INFO 11-25 04:02:25 [api_utils.py:286] non-default args: {'uds': 'x'}",
    EnginePhase.CORE: "(EngineCore pid=2) INFO 11-25 04:02:34 [core.py:133] Initializing a V1 LLM engine (v0.32.0)",
    EnginePhase.WEIGHTS: "(Worker pid=3) INFO 11-25 04:02:41 [cpu_model_runner.py:68] Starting to load model /m...",
    EnginePhase.CACHE: "(Worker pid=3) INFO 11-25 04:02:41 [default_loader.py:501] Loading weights took 0.01 seconds",
    EnginePhase.WARM_UP: "(EngineCore pid=2) INFO 11-25 04:02:42 [kv_cache_utils.py:2327] CPU KV cache size: 2,097",
    EnginePhase.SOCKET: "(APIServer pid=1) INFO 11-25 04:02:43 [entry.py:140] Starting vLLM server on unix:/run/s.sock",
}


def log_of(folder: Path, *lines: str) -> Path:
    log = folder / "engine.log"
    log.write_text("".join(f"{line}\n" for line in lines))
    return log


@pytest.mark.parametrize("phase", LINES)
def test_startup_phases_are_recognized_from_vllm_log_lines(tmp_path: Path, phase: EnginePhase) -> None:
    assert PhaseReader(log_of(tmp_path, "INFO something", LINES[phase], "WARNING else")).look() is phase


def test_startup_phase_is_python_start_until_the_log_exists(tmp_path: Path) -> None:
    assert PhaseReader(tmp_path / "none.log").look() is EnginePhase.PYTHON


def test_incomplete_log_line_is_parsed_once_it_is_complete(tmp_path: Path) -> None:
    log, line = tmp_path / "engine.log", LINES[EnginePhase.CORE]
    reader = PhaseReader(log)
    log.write_text(line[:60])
    assert reader.look() is EnginePhase.PYTHON
    log.write_text(f"{line}\n")
    assert reader.look() is EnginePhase.CORE


def test_startup_phase_is_unchanged_without_a_new_log_line(tmp_path: Path) -> None:
    reader = PhaseReader(log_of(tmp_path, LINES[EnginePhase.CACHE]))
    assert [reader.look(), reader.look()] == [EnginePhase.CACHE] * 2


def test_each_startup_phase_check_reads_only_new_log_lines(tmp_path: Path) -> None:
    log = log_of(tmp_path, "x" * 100)
    reader = PhaseReader(log)
    reader.look()
    log.write_text(f"{LINES[EnginePhase.CORE]}\n"[:101])  # in the place of what was read
    assert reader.look() is EnginePhase.PYTHON


@pytest.mark.slow
@given(st.lists(st.sampled_from(list(LINES)), max_size=8), st.integers(7, 200))
def test_startup_phase_never_moves_backward_while_the_log_grows(
    tmp_path_factory: pytest.TempPathFactory, said: list[EnginePhase], piece: int
) -> None:
    text = "".join(f"{LINES[phase]}\n" for phase in said)
    log = tmp_path_factory.mktemp("log") / "engine.log"
    reader, order, seen = PhaseReader(log), list(EnginePhase), []
    for end in range(piece, len(text) + piece, piece):
        log.write_text(text[:end])
        seen.append(order.index(reader.look()))
    assert seen == sorted(seen)
    assert seen[-1:] == [max(order.index(phase) for phase in said)][: len(said)] if said else not seen
