"""Tests GGUF files of llama.cpp's tool, which stand-ins replace: a copy of the F16 file is a perfect quantization."""

import os
import sys
from pathlib import Path

import pytest

from svc.dataset.schema.example import ChatExample
from svc.errors import NotFoundError, TrainingError
from trainer.export.gguf import k_quants as module
from trainer.export.gguf.k_quants import TOOL, KQuant, export_k_quant

COPY = "import shutil; shutil.copyfile(source, target)"
"""Written file of a tool without any rounding."""


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only folder on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def make_tool(folder: Path, body: str) -> Path:
    """Write a `llama-quantize` that records its arguments and runs a body; return the file of arguments."""
    tool, record = folder / TOOL, folder / "arguments"
    lines = (
        f"#!{sys.executable}",
        "import sys",
        f"open({str(record)!r}, 'w').write('\\n'.join(sys.argv[1:]))",
        "source, target, type, threads = sys.argv[1:]",
        body,
    )
    tool.write_text("\n".join(lines))
    tool.chmod(0o755)
    return record


@pytest.mark.slow
@pytest.mark.parametrize("type", KQuant)
def test_f16_file_is_quantized_by_the_tool_and_then_removed(
    tiny_base: Path, examples: list[ChatExample], bin_folder: Path, tmp_path: Path, type: KQuant
) -> None:
    record, out = make_tool(bin_folder, COPY), tmp_path / "out"
    done = export_k_quant(tiny_base, out, "tiny-1", examples, type)
    source, target, given, threads = record.read_text().splitlines()
    assert Path(source).name == "tiny-1-f16.gguf"
    assert Path(target).parent == Path(source).parent
    assert (given, threads) == (type.upper(), str(len(os.sched_getaffinity(0))))
    assert {path.name for path in out.iterdir()} == {"Modelfile", f"tiny-1-{type}.gguf"}
    assert (out / "Modelfile").read_text().startswith(f"FROM ./tiny-1-{type}.gguf\n")
    assert (done.bytes, done.compared) == (done.file.stat().st_size, len(examples))


def test_missing_quantize_tool_is_reported_before_any_file_is_written(
    tiny_base: Path, examples: list[ChatExample], bin_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match="llama-quantize is not on PATH") as caught:
        export_k_quant(tiny_base, tmp_path / "out", "tiny", examples, KQuant.Q4_K_M)
    assert caught.value.exit_code == 8
    assert "install llama.cpp" in caught.value.todo
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("sys.exit('unknown architecture')", "exited with code 1: unknown architecture"),
        ("pass", "exited with code 0: no output"),
        (f"{COPY}; f = open(target, 'r+b'); f.seek(-4096, 2); f.write(b'\\x30' * 4096)", "of its norm"),
    ],
    ids=["fails", "writes nothing", "writes other weights"],
)
def test_no_files_remain_when_the_quantization_tool_fails_or_writes_a_wrong_file(
    tiny_base: Path, examples: list[ChatExample], bin_folder: Path, tmp_path: Path, body: str, told: str
) -> None:
    make_tool(bin_folder, body)
    with pytest.raises(TrainingError, match=told):
        export_k_quant(tiny_base, tmp_path / "out", "tiny", examples, KQuant.Q6_K)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_quantization_tool_is_stopped_after_its_timeout(
    tiny_base: Path, examples: list[ChatExample], bin_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tool(bin_folder, "import time; time.sleep(60)")
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.3)
    with pytest.raises(TrainingError, match="timed out"):
        export_k_quant(tiny_base, tmp_path / "out", "tiny", examples, KQuant.Q5_K_M)
