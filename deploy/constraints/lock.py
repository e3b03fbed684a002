"""Writes the releases that `make install` takes: the newest that go together today, for CPUs and for GPUs.

pip resolves both without installing anything, from the index's metadata; nothing of a GPU is needed. Run it with
`make lock`, then `make install` and the tests, and commit what they passed with.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETS = {"cpu": "train,serve-cpu,monitor", "gpu": "train,serve,monitor"}
OURS = "tuneserve"
HEAD = "# Made by `make lock`; not to be edited. `make install NEWEST=1` goes without.\n"


def main() -> None:
    """Resolves each set."""
    for name, extras in SETS.items():
        path = ROOT / "deploy" / "constraints" / f"{name}.txt"
        before = path.read_text("utf-8") if path.exists() else HEAD
        print(f"resolving for {name} …", flush=True)
        found = resolve(extras)
        path.write_text(HEAD + "".join(f"{package}=={version}\n" for package, version in found), "utf-8")
        changed = set(path.read_text("utf-8").splitlines()) - set(before.splitlines())
        print(f"{path.relative_to(ROOT)}: {len(found)} packages, {len(changed)} changed", *sorted(changed), sep="\n  ")


def resolve(extras: str) -> list[tuple[str, str]]:
    """Names and versions, sorted, without the build that a version may name, as in 2.13.0+cpu: an index has its own.

    Raises:
        CalledProcessError: pip found none that go together, and said why.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run(
        [*command, "--editable", f".[{extras}]", "--group", "dev"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    packages = [package["metadata"] for package in json.loads(done.stdout)["install"]]
    versions = {package["name"].lower(): package["version"].partition("+")[0] for package in packages}
    return sorted((name, version) for name, version in versions.items() if name != OURS)


if __name__ == "__main__":
    main()
