"""Writes monitoring/prometheus_rule.yaml for the Prometheus operator from the rules in deploy/prometheus.

Run it with `make rules`.
"""

from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parent
_RULES = _FOLDER.parent / "prometheus" / "rules"
FILE = _FOLDER / "monitoring" / "prometheus_rule.yaml"
_HEAD = "# Generated from deploy/prometheus/rules by `make rules`.\n"


class _Dumper(yaml.SafeDumper):
    """YAML dumper that preserves multi-line expressions."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def content() -> str:
    """Return the content of prometheus_rule.yaml."""
    files = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(_RULES.glob("*.yml"))]
    rule: dict[str, Any] = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "tuneserve", "labels": {"app.kubernetes.io/name": "tuneserve"}},
        "spec": {"groups": [group for file in files for group in file["groups"]]},
    }
    return _HEAD + yaml.dump(rule, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


if __name__ == "__main__":
    FILE.write_text(content(), "utf-8")
    print(FILE)
