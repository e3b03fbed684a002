"""Evaluates queries on given series with the real promtool."""

import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

_PROMTOOL = Path(__file__).parents[2] / ".venv" / "prometheus" / "bin" / "promtool"


def case(expr: str, series: Mapping[str, str], expected: Mapping[str, float]) -> dict[str, Any]:
    """Return a promtool test of a query's results after an hour of the given series, rounded to four digits."""
    samples = [{"labels": labels, "value": round(value, 4)} for labels, value in expected.items()]
    check = {"expr": f"round({expr}, 0.0001)", "eval_time": "1h", "exp_samples": samples}
    given = [{"series": name, "values": values} for name, values in series.items()]
    return {"name": str(series), "interval": "1m", "input_series": given, "promql_expr_test": [check]}


def run_cases(folder: Path, cases: Iterable[dict[str, Any]]) -> None:
    """Check test cases in a single promtool run.

    Args:
        folder: folder for a temporary file.
    """
    page = folder / "test.yml"
    page.write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": list(cases)}), "utf-8")
    done = subprocess.run([_PROMTOOL, "test", "rules", page], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
