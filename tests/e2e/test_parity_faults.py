"""Tests that a fault in the served form is found on the serving engine before a version is registered."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.service import svc, svc_json
from svc.model_folder.chat_template import read_chat_template
from svc.model_folder.weight_files import weight_files

pytestmark = [pytest.mark.matrix]

LAYER = "model.layers.1.mlp.up_proj"
Weights = dict[str, torch.Tensor]


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def load_shards(base: Path) -> Weights:
    return {name: weight for path in weight_files(base) for name, weight in load_file(path).items()}


def apply_adapter_again(run: Path, base: Path) -> None:
    before = load_shards(base)
    change_weights(
        run / "merged",
        lambda merged: {
            name: (2 * weight.float() - before[name].float()).bfloat16() for name, weight in merged.items()
        },
    )


def forget_adapter(run: Path, base: Path) -> None:
    change_weights(run / "merged", lambda _: load_shards(base))


def shuffle_layer(run: Path, base: Path) -> None:
    name = f"{LAYER}.weight"
    change_weights(run / "merged", lambda merged: merged | {name: merged[name].flip(0).contiguous()})


def change_template(run: Path, base: Path) -> None:
    template = (read_chat_template(base) or "").replace("<|im_start|>", "<|im_start|> ")
    (run / "merged" / "chat_template.jinja").write_text(template, "utf-8")


def corrupt_scales(run: Path, base: Path) -> None:
    name = f"{LAYER}.scales"
    change_weights(run / "gptq", lambda gptq: gptq | {name: gptq[name] * 2})


FAULTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "adapter applied twice": (apply_adapter_again, "merged: compared with the trained model"),
    "adapter not applied": (forget_adapter, "merged: compared with the trained model"),
    "one layer shuffled": (shuffle_layer, "merged: compared with the trained model"),
    "another template": (change_template, "merged: prompt tokens on the engine"),
    "GPTQ scales corrupted": (corrupt_scales, "gptq: weight rounding"),
}


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    """Return a home with one version whose run folder still contains its weights."""
    home = workplace / "faults-home"
    svc_json(home, "train", str(workplace / "recipe.yaml"), "--set", "qualify.restart=false")
    return home


@pytest.mark.parametrize(("plant", "check"), FAULTS.values(), ids=FAULTS)
def test_version_is_not_registered_if_serving_outputs_differ_from_training(
    trained: Path, workplace: Path, tmp_path: Path, plant: Callable[[Path, Path], None], check: str
) -> None:
    home = shutil.copytree(trained, tmp_path / "home")
    shutil.rmtree(home / "models" / "tiny")
    (run,) = (home / "runs").iterdir()
    for stage in ("evaluate", "qualify", "parity"):
        (run / f"{stage}.json").unlink()
    plant(run, workplace / "base")
    done = svc(home, "train", str(workplace / "recipe.yaml"), "--set", "qualify.restart=false", capture_output=True)
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "the model to serve differs from the trained model" in message
    assert check in message
    assert svc_json(home, "models") == []
