"""The list of GPUs in gpus.yaml: published speed, memory and prices, for estimates of training and serving."""

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from svc.errors import SettingsError

GPUS_FILE = Path(__file__).with_name("gpus.yaml")


class ListedGpu(BaseModel):
    """A GPU's entry in gpus.yaml.

    Attributes:
        memory_gib: total memory, as reported by nvidia-smi.
        tflops: throughput of dense bfloat16 matrix products, in 10^12 operations per second.
        bandwidth: memory bandwidth in GB/s.
        utilization: fraction of `tflops` that training achieves, keyed by training method.
        dollars: price per hour.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    memory_gib: float = Field(gt=0)
    tflops: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    utilization: dict[str, float]
    dollars: float = Field(ge=0)
    speed_source: str
    price_source: str


class _Catalogue(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    utilization_source: str
    devices: dict[str, ListedGpu]


def read_gpus(path: Path = GPUS_FILE) -> dict[str, ListedGpu]:
    """Return the GPUs listed in a YAML file, keyed by name.

    Raises:
        SettingsError: the file cannot be read or is not valid.
    """
    try:
        return _Catalogue.model_validate(yaml.safe_load(path.read_text("utf-8"))).devices
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise SettingsError(
            f"cannot read GPUs from {path}: {error}", expected="the fields described in docs/estimate.md"
        ) from error
