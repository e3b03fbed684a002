"""Tests that a check's memory depends on its line table: a million lines (1 GB) stay under 512 MiB."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

LINES = 40_000
_MEASURED = """
import resource, sys
from pathlib import Path
from svc.dataset.checks.check import check_files
[report] = check_files([Path(sys.argv[1])])
print(report.lines, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_examples(path: Path, lines: int) -> None:
    """Write distinct examples of one kilobyte each."""
    numbers = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(lines):
            text = " ".join(f"{numbers.getrandbits(32):x}" for _ in range(100))
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text[:20]}]
            file.write(json.dumps({"messages": turns}) + "\n")


def peak_memory(path: Path, lines: int) -> int:
    """Return the peak memory, in bytes, of a process that checks such a file."""
    write_examples(path, lines)
    done = subprocess.run([sys.executable, "-c", _MEASURED, str(path)], capture_output=True, text=True, check=True)
    counted, peak = done.stdout.split()
    assert int(counted) == lines
    return int(peak)


@pytest.mark.slow
def test_data_check_memory_grows_by_only_a_few_bytes_per_line(tmp_path: Path) -> None:
    few, many = (peak_memory(tmp_path / f"{lines}.jsonl", lines) for lines in (LINES // 40, LINES))
    # A start of 150 MiB leaves 360 bytes for each of a million lines.
    assert (many - few) / LINES < 360
