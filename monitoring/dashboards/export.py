"""The dashboards as the files that Grafana reads: the same text each time, so that a change is seen in review."""

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from monitoring.dashboards.drift import drift
from monitoring.dashboards.engine import engine
from monitoring.dashboards.overview import overview
from monitoring.dashboards.training import training
from monitoring.dashboards.versions import versions


def files() -> dict[str, str]:
    """Every dashboard's JSON, by file name."""
    dashboards = {
        "overview": overview(),
        "versions": versions(),
        "drift": drift(),
        "engine": engine(),
        "training": training(),
    }
    return {
        f"{name}.json": json.dumps(dashboard, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, dashboard in dashboards.items()
    }


def write(folder: Path) -> list[Path]:
    """Writes the files, over those that are there; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in files().items():
        (folder / name).write_text(text, "utf-8")
        paths.append(folder / name)
    return paths
