"""Stands for `svc train`: takes steps, writes their progress and a checkpoint, and stops like it.

Run as a script with the path of a recipe and of a progress file. The recipe's section `fake` says what it does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import yaml

RECIPE, PROGRESS = Path(sys.argv[1]), Path(sys.argv[2])
FOLDER = RECIPE.parent
CHECKPOINT, STARTS, GRANDCHILD = FOLDER / "checkpoint", FOLDER / "starts", FOLDER / "grandchild"


def write(**record: object) -> None:
    with PROGRESS.open("a") as file:
        file.write(json.dumps(record) + "\n")


def interrupted(number: int, frame: FrameType | None) -> None:
    global stopped
    stopped = not FAKE.get("deaf")


stopped = False
FAKE = {"steps": 3, "step_s": 0.02, "exit": 0, "text": ""} | yaml.safe_load(RECIPE.read_text()).get("fake", {})
signal.signal(signal.SIGTERM, interrupted)
with STARTS.open("a") as starts:
    starts.write(f"{os.getpid()}\n")
(PROGRESS.with_name("epochs") / "1").mkdir(parents=True, exist_ok=True)
if FAKE.get("grandchild"):  # in its own session, as an engine is, and without the variables
    child = subprocess.Popen(["sleep", "300"], start_new_session=True, env={})
    GRANDCHILD.write_text(str(child.pid))
if FAKE["exit"] and "at" not in FAKE:
    print(FAKE["text"], file=sys.stderr)
    sys.exit(FAKE["exit"])
write(kind="stage", name="train")
first = int(CHECKPOINT.read_text()) if CHECKPOINT.exists() else 0
for step in range(first + 1, FAKE["steps"] + 1):
    time.sleep(FAKE["step_s"])
    if stopped:
        sys.exit(16)
    left = (FAKE["steps"] - step) * FAKE["step_s"]
    epoch = step / FAKE["steps"]
    write(kind="step", step=step, steps=FAKE["steps"], epoch=epoch, loss=2 / step, tokens=10 * step, left_s=left)
    Path(f"{CHECKPOINT}.new").write_text(str(step))
    Path(f"{CHECKPOINT}.new").replace(CHECKPOINT)
    if step == FAKE.get("at"):
        os.kill(os.getpid(), signal.SIGKILL)
write(kind="heldout", step=FAKE["steps"], loss=0.5, accuracy=0.75)
write(kind="registered", version=f"{yaml.safe_load(RECIPE.read_text())['name']}@1")
