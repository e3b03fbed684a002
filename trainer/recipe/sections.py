"""The recipe, which states in YAML what to train. Every key except `name`, `base` and `data.train` has a
default.

Unknown keys and wrong types are errors, because ignoring a misspelt hyperparameter would waste a night
of training.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from svc.dataset.readers.source import HUB_PREFIX
from svc.dataset.schema.objective import Objective
from svc.evaluation.metrics.choose import MetricOptions
from svc.evaluation.metrics.function import FunctionSpec
from svc.model_folder.chat_template import TemplateValue
from svc.version import NAME_PATTERN, Format
from trainer.recipe.named_template import TEMPLATE_CHOICES, NamedTemplate
from trainer.recipe.targets import Targets


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _beside_recipe(value: Any, info: ValidationInfo) -> Any:
    """Resolve a path relative to the recipe's folder, so that a recipe works from any working directory.

    A value that is not a path is returned unchanged.
    """
    folder = (info.context or {}).get("folder", Path())
    try:
        return (folder / value.expanduser()).absolute() if isinstance(value, Path) else value
    except RuntimeError as error:
        raise ValueError(f"cannot expand {value}: this machine has no such user") from error


def _as_sources(value: Any) -> Any:
    """Wrap a single data source in a list. Other values are returned unchanged."""
    return [str(value)] if isinstance(value, str | Path) else value


def _sources_beside_recipe(sources: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    return tuple(
        source if source.startswith(HUB_PREFIX) else str(_beside_recipe(Path(source), info)) for source in sources
    )


def _as_template(value: Any) -> Any:
    """Parse a value as the name of a chat template or as the path of a file ending in .jinja.

    Raises:
        ValueError: the value is neither.
    """
    if value in tuple(NamedTemplate):
        return NamedTemplate(value)
    if value is None or (isinstance(value, str | Path) and Path(value).suffix == ".jinja"):
        return value and Path(value)
    raise ValueError(f"expected {TEMPLATE_CHOICES}")


_NAME = Annotated[str, Field(min_length=1)]
Sources = Annotated[
    tuple[_NAME, ...],
    BeforeValidator(_as_sources),
    AfterValidator(_sources_beside_recipe),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""Data sources, given as a list or a single entry. Each is a file, a folder or a Hub dataset (hf:ORG/NAME)."""


def _metric_beside_recipe(name: str | None, info: ValidationInfo) -> str | None:
    """Resolve the path in the name of a metric function, relative to the recipe's folder. Names of other
    metrics are returned unchanged.
    """
    spec = name and FunctionSpec.parse(name)
    return f"{_beside_recipe(spec.path, info)}:{spec.function}" if spec else name


def _metrics_beside_recipe(names: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
    return names and tuple(_metric_beside_recipe(name, info) or name for name in names)


ChatTemplate = Annotated[
    NamedTemplate | Path | None,
    BeforeValidator(_as_template),
    AfterValidator(_beside_recipe),
    WithJsonSchema({"anyOf": [{"enum": list(NamedTemplate)}, {"type": "string", "format": "path"}, {"type": "null"}]}),
]
"""Name of a built-in chat template, or the path of a file ending in .jinja."""
Metrics = Annotated[
    tuple[_NAME, ...],
    BeforeValidator(_as_sources),
    AfterValidator(_metrics_beside_recipe),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""Names of metrics or metric functions (`./FILE.py:FUNCTION`), given as a list or a single entry."""


class Learn(StrEnum):
    """Which answers of a training example are learnt if none of its turns specifies a weight."""

    LAST = "last"
    ALL = "all"


class Data(_Section):
    """Sources of examples: files, folders, or Hub datasets (`hf:ORG/NAME`); see [data](data.md)."""

    train: Sources
    """examples to train on"""
    heldout: Sources | None = None
    """examples for evaluating the version, which are never used for training; default: a part of `data.train`"""
    heldout_share: float = Field(0.1, gt=0, lt=1)
    """share of `data.train` that is held out if `data.heldout` is not set"""
    validation: Sources | None = None
    """validation examples: their loss is measured during training and in sweeps, and decides which weights and
    values are selected. The held-out examples are then not used for selection, so a version's figures are
    unbiased; default: the held-out examples"""
    general: Sources | None = None
    """general examples that are mixed into the training examples to reduce forgetting"""
    general_share: float = Field(0.1, gt=0, lt=1)
    """share of general examples in the training examples"""
    learn: Learn = Learn.ALL
    """all or last: which answers of a training example are learnt; a `weight` on a turn overrides this, see
    [data](data.md#conversations)"""
    seed: int = Field(0, ge=0)
    """seed for selecting the held-out examples and the general examples"""
    skip: int = Field(0, ge=0)
    """number of training examples to skip at the start"""
    limit: Annotated[int, Field(ge=2)] | None = None
    """maximum number of training examples; default: all"""


class AdapterType(StrEnum):
    """Kind of adapter, which determines how it changes a layer."""

    LORA = "lora"
    """A low-rank update added to frozen weights (Hu et al. 2021)."""
    DORA = "dora"
    """LoRA for the direction of the weights, plus one magnitude per output (Liu et al. 2024)."""
    ADALORA = "adalora"
    """LoRA that distributes its ranks among the layers during training (Zhang et al. 2023)."""
    VERA = "vera"
    """Two trained vectors per layer, combined with random matrices that all layers share (Kopiczko et al.
    2023)."""


class Quantization(StrEnum):
    """Number format of the frozen weights during the training of an adapter."""

    NF4 = "nf4"
    """Quantization to four bits, with quantized scales (Dettmers et al. 2023)."""


class Method(StrEnum):
    """Training method: the common name for an adapter type combined with a quantization of the base. `full`
    trains all weights.
    """

    FULL = "full"
    """Every weight is trained."""
    LORA = "lora"
    """Low-rank updates added to frozen weights (Hu et al. 2021)."""
    QLORA = "qlora"
    """LoRA on frozen weights stored in 4 bits (Dettmers et al. 2023), which take a quarter of the memory."""
    DORA = "dora"
    """LoRA for the direction of the weights, plus one magnitude per output (Liu et al. 2024)."""
    ADALORA = "adalora"
    """LoRA that distributes its ranks among the layers during training (Zhang et al. 2023)."""
    VERA = "vera"
    """Two trained vectors per layer, combined with random matrices that all layers share (Kopiczko et al.
    2023)."""


MAX_RANK = 1024


class Adapter(_Section):
    """Adapter settings, which do not apply to `method: full`."""

    type: AdapterType | None = None
    """lora, dora, adalora or vera; default: the type implied by `method`"""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] | None = None
    """rank of the update; a higher rank can learn more but needs more memory; default: 16, or 256 for vera"""
    alpha: Annotated[int, Field(ge=1)] | None = None
    """scale of the update, which is multiplied by alpha / rank; default: twice the rank; not used by vera"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """share of the adapter's inputs that are dropped in each step"""
    targets: Targets = Targets.ALL_LINEAR
    """layers that get an adapter: all-linear, attention, or attention-min for query and value only"""
    rslora: bool = False
    """scale by alpha / sqrt(rank), so that large ranks learn as fast as small ones; lora and dora only"""


class DpoLoss(StrEnum):
    """Loss of DPO for a pair, given the difference of the two answers' log ratios."""

    SIGMOID = "sigmoid"
    """Negative log-likelihood of the preference (Rafailov et al. 2023, eq. 7)."""
    IPO = "ipo"
    """Squared distance from a margin, per token, which overfits less (Azar et al. 2023, eq. 17)."""
    ROBUST = "robust"
    """`sigmoid`, corrected for a known share of wrong preferences (Chowdhury et al. 2024)."""


class Preference(_Section):
    """Preference tuning with `objective: dpo`, `orpo` or `kto`; see [training](training.md#preferences)."""

    beta: float = Field(0.1, gt=0)
    """dpo, kto: how strongly the model is held to the one before training, higher is closer; orpo: weight of the
    preference compared with the likelihood of the better answer"""
    loss: DpoLoss = DpoLoss.SIGMOID
    """dpo: sigmoid, ipo, or robust if a known share of the pairs is wrong"""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """dpo with `loss: robust`: share of the pairs whose preference is wrong"""
    desirable_weight: float = Field(1.0, gt=0)
    """kto: weight of desirable answers; the ratio of both weights should balance the numbers of answers"""
    undesirable_weight: float = Field(1.0, gt=0)
    """kto: weight of undesirable answers"""


class Schedule(StrEnum):
    """Shape of the learning rate schedule after warmup."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class TooLong(StrEnum):
    """What to do with an example longer than `train.max_length`."""

    ERROR = "error"
    DROP = "drop"
    TRUNCATE = "truncate"


class Sharding(StrEnum):
    """When several devices divide the weights among them instead of each having a copy."""

    AUTO = "auto"
    """If a copy does not fit on one device."""
    NEVER = "never"
    ALWAYS = "always"


class Optimizer(StrEnum):
    """Optimizer. The choice determines the size of its two moments per weight and where they are stored."""

    ADAMW = "adamw"
    """AdamW with moments in float32 (Loshchilov and Hutter 2019)."""
    ADAMW_8BIT = "adamw-8bit"
    """AdamW from bitsandbytes with 8-bit moments, quantized in blocks of 256 with a scale each (Dettmers et al.
    2022)."""
    PAGED_ADAMW = "paged-adamw"
    """AdamW from bitsandbytes with moments that are moved to main memory when the GPU is full (Dettmers et al.
    2023)."""
    PAGED_ADAMW_8BIT = "paged-adamw-8bit"
    """AdamW from bitsandbytes with 8-bit moments that are moved to main memory when the GPU is full."""

    @property
    def is_8bit(self) -> bool:
        """Whether the optimizer's moments are stored in 8 bits."""
        return self in (Optimizer.ADAMW_8BIT, Optimizer.PAGED_ADAMW_8BIT)

    @property
    def is_paged(self) -> bool:
        """Whether the optimizer's moments can be moved to main memory."""
        return self in (Optimizer.PAGED_ADAMW, Optimizer.PAGED_ADAMW_8BIT)


Devices = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)],
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "array", "items": {"type": "integer"}, "minItems": 1}]}
    ),
]
"""Number of devices, or the indices of GPUs."""


DEVICE_KEYS = {"devices", "sharding"}
"""Keys of `train` that affect the result only in rounding and random numbers."""


class Train(_Section):
    """Training settings: optimizer, learning rate, batches and lengths."""

    optimizer: Optimizer = Optimizer.ADAMW
    """adamw, adamw-8bit, paged-adamw or paged-adamw-8bit; 8-bit moments take a quarter of the memory, and paged
    moments are moved to main memory when the GPU is full; see [training](training.md#optimizers)"""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """peak learning rate; default for bases of hidden width 576 or less: 5e-4, or 1e-2 for adalora, 6e-2 for
    vera and 5e-5 for full; lower for wider bases and for preferences, see [training](training.md#learning-rate)"""
    schedule: Schedule = Schedule.LINEAR
    """how the learning rate decays: linear or cosine to 0, or constant"""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """share of the steps used for warmup, during which the learning rate rises"""
    epochs: float = Field(1.0, gt=0)
    """number of passes over the training examples"""
    steps: Annotated[int, Field(ge=1)] | None = None
    """number of steps; overrides `epochs`"""
    devices: Devices | None = None
    """GPUs of this machine to train on: a number, or a list of their indices. They divide the examples of each step
    among them; default: all that are free and equal; on a CPU a number of processes, useful only for testing; see
    [training](training.md#several-gpus)"""
    sharding: Sharding = Sharding.AUTO
    """auto, never or always: whether several devices divide the weights, gradients and moments among them (FSDP2)
    instead of each having a copy; auto does so if a copy does not fit on one device; see
    [training](training.md#models-that-do-not-fit-on-one-gpu)"""
    batch_size: int = Field(16, ge=1)
    """number of examples per batch; the examples of a step are batch_size x gradient_accumulation, on any number of
    devices"""
    gradient_accumulation: int = Field(1, ge=1)
    """batches per optimizer step; accumulating batches needs less memory than a larger batch"""
    weight_decay: float = Field(0.0, ge=0)
    """weight decay of AdamW"""
    max_grad_norm: float = Field(1.0, gt=0)
    """maximum gradient norm; larger gradients are clipped"""
    max_length: int = Field(1024, ge=16)
    """maximum length of an example, in tokens"""
    too_long: TooLong = TooLong.ERROR
    """error, drop or truncate: what to do with longer examples; with `--skip-bad`, error also drops them"""
    packing: bool = False
    """pack several examples into one row of max_length tokens; each example attends only to itself, and a row
    then counts as one example"""
    gradient_checkpointing: bool | None = None
    """recompute activations instead of storing them; default: on a GPU, true unless training fits in its free
    memory without; false on a CPU"""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """strength of the noise added to the embeddings (Jain et al. 2023), usually 5; default: no noise"""
    seed: int = Field(0, ge=0, lt=2**32)
    """seed for the order of the examples and the adapter's initial weights"""

    @field_validator("devices")
    @classmethod
    def _lists_devices_once(cls, devices: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        if isinstance(devices, tuple) and len(set(devices)) < len(devices):
            raise ValueError("train.devices lists a device twice")
        return devices


class Stopping(_Section):
    """Measuring held-out loss during training, or validation loss if `data.validation` is set. A loss that was
    used to select the weights is slightly too optimistic.
    """

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """number of steps between two measurements; default: a tenth of all steps, if another key requires
    measurements"""
    patience: Annotated[int, Field(ge=1)] | None = None
    """stop after this many measurements without a lower held-out loss; default: never"""
    keep_best: bool = False
    """keep the weights with the lowest held-out loss instead of the final weights"""
    curve: bool = True
    """unless another key requires measurements anyway, measure held-out loss up to six times on up to 64
    examples, taking less than a twentieth of the run's time; in runs of 20 to 49 steps, up to three times,
    taking less than a quarter. This does not affect the weights"""

    @property
    def measures(self) -> bool:
        """Whether any key other than `curve` requires measuring held-out loss."""
        return self.every_steps is not None or self.selects

    @property
    def selects(self) -> bool:
        """Whether held-out loss decides which weights are kept, either through early stopping or through
        `keep_best`.
        """
        return self.patience is not None or self.keep_best


class Checkpoints(_Section):
    """Checkpoints from which an interrupted training run resumes. They do not change the result."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """steps between two checkpoints; default: checkpoints are saved by time only"""
    every_minutes: float = Field(10.0, gt=0)
    """number of minutes between two checkpoints"""
    keep: int = Field(2, ge=1)
    """number of checkpoints to keep, newest first; the best checkpoint is always kept as well"""
    keep_epochs: int = Field(0, ge=0)
    """number of epochs, counted from the end, after which the adapter is saved for clients of the fine-tuning API; only
    with `svc train --progress FILE`, in the folder `epochs` beside the file"""


class Quantize(_Section):
    """4-bit GPTQ quantization. `group_size` must divide the model's layer widths: 64 fits most models, and
    large models often use 128.
    """

    group_size: Literal[32, 64, 128] = 64
    """number of weights that share a quantization scale"""
    samples: int = Field(64, ge=8, le=1024)
    """number of training examples used to calibrate GPTQ; they are truncated to `train.max_length`"""
    sequential: bool = True
    """quantize the layers of a block one after another, each based on the outputs of the layers already
    quantized; slower"""


class Judge(_Section):
    """A model that compares the merged model's answers with the base's; see
    [evaluation](evaluation.md#a-judge).
    """

    url: str | None = None
    """OpenAI-compatible endpoint of the judge, for example `https://api.openai.com/v1`; it receives prompts,
    reference answers and answers; default: no judge"""
    model: str | None = None
    """name of the judge model at this endpoint"""
    key_file: Annotated[Path, AfterValidator(_beside_recipe)] | None = None
    """file that contains the API key and has owner-only permissions; default: no key"""

    @model_validator(mode="after")
    def _is_complete(self) -> "Judge":
        if (self.url is None) is not (self.model is None) or (self.key_file and self.url is None):
            raise ValueError("judge.url and judge.model must be set together")
        return self


class Undecided(StrEnum):
    """What to do when a gate's interval neither proves nor rules out a loss above its limit."""

    WARN = "warn"
    FAIL = "fail"


class Evaluate(_Section):
    """Evaluation of the base, merged and GPTQ models on the engine."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """number of held-out examples to evaluate, drawn at random with `data.seed`; default: all"""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """maximum length of an answer in tokens; default: 1.5 times the length of the example's reference answer
    plus 16, see [evaluation](evaluation.md#how-long-an-answer-may-be)"""
    metrics: Metrics | None = None
    """metrics for scoring the answers: names, `rouge` for all three ROUGE metrics, or functions
    (`./FILE.py:FUNCTION`); default: the metrics of the task, see [evaluation](evaluation.md)"""
    primary: Annotated[_NAME, AfterValidator(_metric_beside_recipe)] | None = None
    """metric that decides the GPTQ gate and that monitoring measures repeatedly; default: the task's primary
    metric"""
    json_schema: Annotated[Path, AfterValidator(_beside_recipe)] | None = None
    """file with the JSON Schema for the `schema_valid` metric; default: inferred from the held-out answers"""
    metric_seconds: float = Field(60.0, gt=0)
    """total time that a metric function may take to score all answers, in seconds"""
    max_gptq_loss: float = Field(0.05, ge=0, le=1)
    """largest loss in the primary metric that quantization may cause; relative to the merged model's value if
    the metric is not a share (for example perplexity); a version is rejected if a larger loss is proven"""
    # 4 bits cost SmolLM2-135M 0.042 [0.033, 0.053] on free text (synopsis task), and nothing of its ROUGE.
    max_gptq_nll: float = Field(0.05, ge=0)
    """largest increase in negative log-likelihood that quantization may cause, as a share of the merged model's
    value, but at least 0.005 nats per token; a version is rejected if a larger increase is proven"""

    general: Annotated[bool | Path, AfterValidator(_beside_recipe)] = True
    """ask the base, merged and GPTQ models general questions, which are never used for training: true for the
    built-in questions, a file with your own, or false for none; see [evaluation](evaluation.md#forgetting)"""
    general_limit: Annotated[int, Field(ge=1)] | None = 60
    """maximum number of general questions, taken from the start of the list; null: all"""
    max_forgetting: Annotated[float, Field(ge=0, le=1)] | None = None
    """largest allowed loss of correct answers to general questions, from the base to the merged model and to
    the GPTQ model, as a share of all questions; a version is rejected if a larger loss is proven; default:
    no limit"""
    undecided: Undecided = Undecided.WARN
    """warn or fail: what to do with a version if the number of evaluated examples is too small to prove or rule
    out a loss above one of these limits; see [evaluation](evaluation.md#verdicts)"""

    @property
    def metric_options(self) -> MetricOptions:
        """The settings that determine which metrics are used."""
        return MetricOptions(self.metrics, self.primary, self.json_schema, self.metric_seconds)

    @property
    def metric_files(self) -> tuple[Path, ...]:
        """Files that the user provides for metrics: the files of metric functions and the JSON Schema."""
        named = (*(self.metrics or ()), *([self.primary] if self.primary else []))
        functions = [spec.path for name in named if (spec := FunctionSpec.parse(name))]
        return (*functions, *([self.json_schema] if self.json_schema else []))


class Qualify(_Section):
    """Probes that verify, whenever the version is loaded later, that the engine is running exactly these
    weights.
    """

    repeats: int = Field(10, ge=1)
    """number of times that the engine's own noise is measured, which sets the minimum tolerance"""
    restart: bool = True
    """also measure on a second engine, to verify that weights loaded in place and weights loaded at start give
    the same results"""


class ReportTo(StrEnum):
    """Tracker for a run's parameters, curves and metrics."""

    MLFLOW = "mlflow"
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"


class Between(_Section):
    """A range of values in a search space. It contains only integers if both ends are integers."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_range(self) -> "Between":
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("in a range, low must be less than high; if log is set, low must also be greater than 0")
        return self


class Sweep(_Section):
    """Search space and final evaluation of `svc sweep`; see [sweep](sweep.md)."""

    space: (
        Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)] | Between], Field(min_length=1)] | None
    ) = None
    """keys of `train` and `adapter` to search, each with a list of values or `{low: , high: , log: true}`;
    default: a search in three phases"""
    trials: int = Field(20, ge=1)
    """maximum number of trials in `sweep.space`; if the space consists of lists with fewer combinations, all of
    them are tried"""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """time in seconds after which no new trial is started; default: no limit"""
    finalists: int = Field(3, ge=0)
    """number of trials with the lowest held-out loss to evaluate on the engine, in addition to the unchanged
    recipe; further trials are evaluated as long as all of them exceed `evaluate.max_forgetting`. The primary
    metric decides among the trials within that limit; 0: held-out loss alone decides"""

    @field_validator("space")
    @classmethod
    def _has_keys(cls, space: dict[str, Any] | None) -> dict[str, Any] | None:
        # Trials train on one device.
        known = [f"train.{key}" for key in Train.model_fields if key not in DEVICE_KEYS]
        known += [f"adapter.{key}" for key in Adapter.model_fields]
        for key in space or ():
            if key not in known:
                raise ValueError(f"unknown key {key!r}{suggest(key, known)}; expected keys of train and adapter")
        return space


def suggest(key: str, known: Sequence[str]) -> str:
    """Return a "did you mean" question that names the most similar known key. If no key is similar, return an
    empty string.
    """
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# Held-out loss after 240 examples of the section task (SmolLM2-135M, 15 steps): lora 0.45; full 0.43; adalora 0.37, at
# 2e-3 2.52; vera 0.36, at 2e-2 0.73. Their vectors start at or near 0, and Adam moves each by no more than the rate.
_LEARNING_RATES = {None: 5e-5, AdapterType.ADALORA: 1e-2, AdapterType.VERA: 6e-2}
_MEASURED_WIDTH = 576
"""Hidden width of SmolLM2-135M, with which these learning rates were measured. See docs/training.md for
rates of wider models."""
_UNUSED = {AdapterType.VERA: frozenset({"alpha", "rslora"}), AdapterType.ADALORA: frozenset({"rslora"})}
"""Keys of the `adapter` section that an adapter type does not use."""
_PREFERENCE_RATES = {
    Objective.DPO: (0.1, 0.02),
    Objective.KTO: (0.1, 0.02),
    Objective.ORPO: (0.2, 0.2),
}
"""Default learning rate of each preference objective as a share of that for reference answers: of adapters, and of
all weights. docs/training.md has the published rates between which they lie."""
_PREFERENCE_KEYS: dict[Objective, frozenset[str]] = {
    Objective.SFT: frozenset(),
    Objective.DPO: frozenset({"beta", "loss", "label_smoothing"}),
    Objective.ORPO: frozenset({"beta"}),
    Objective.KTO: frozenset({"beta", "desirable_weight", "undesirable_weight"}),
}
"""Keys of the `preference` section that each objective uses."""
_ADAPTER_TYPES = {Method.FULL: None, Method.QLORA: AdapterType.LORA} | {
    method: AdapterType(method) for method in Method if method not in (Method.FULL, Method.QLORA)
}


class Recipe(_Section):
    """A recipe, which describes how to train one model."""

    name: str = Field(pattern=NAME_PATTERN)
    """name under which clients request the model"""
    base: str = Field(min_length=1)
    """base model: a known id, a Hugging Face id, NAME@N, a local folder or a GGUF file"""
    method: Method = Method.LORA
    """full, lora, qlora, dora, adalora or vera; for other combinations, such as QDoRA, set `adapter.type` and
    `quantization` instead"""
    objective: Objective = Objective.SFT
    """sft: learn the reference answers; dpo or orpo: learn from pairs of a better and a worse answer; kto: learn from
    single answers that are desirable or not; see [training](training.md#preferences)"""
    quantization: Quantization | None = None
    """nf4: store the frozen weights in 4 bits during training; default: the quantization implied by `method`"""
    merge_dequantized: bool = False
    """with nf4: merge the adapter into the dequantized weights it was trained on, not into the base's original weights;
    see [training](training.md#merging-after-qlora)"""
    chat_template: ChatTemplate = None
    """name or file (`./FILE.jinja`) of a chat template, for a base that has none or to replace the base's own;
    see [base models](base_models.md#a-base-without-a-chat-template); default: the base's own"""
    chat_template_kwargs: dict[str, TemplateValue] | None = None
    """arguments of the chat template in training, evaluation and serving; default: `enable_thinking: false` and
    `date_string: 26 Jul 2024`, if the template uses them"""
    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = (Format.MERGED, Format.GPTQ)
    """formats to create, evaluate and register: adapter, merged, gptq; an adapter is always stored. Without
    merged, the base is not evaluated and answers only the general questions"""
    report_to: tuple[ReportTo, ...] = (ReportTo.MLFLOW,)
    """trackers for parameters, losses and metrics: mlflow, wandb, tensorboard; MLflow always receives them"""
    data: Data
    adapter: Adapter = Adapter()
    train: Train = Train()
    preference: Preference = Preference()
    stopping: Stopping = Stopping()
    checkpoints: Checkpoints = Checkpoints()
    quantize: Quantize = Quantize()
    evaluate: Evaluate = Evaluate()
    judge: Judge = Judge()
    qualify: Qualify = Qualify()
    sweep: Sweep = Sweep()

    @field_validator("base")
    @classmethod
    def _local_base(cls, base: str, info: ValidationInfo) -> str:
        """Resolve a relative path to a base against the recipe's folder."""
        is_path = base.startswith((".", "/", "~")) or base.endswith(".gguf")
        return str(_beside_recipe(Path(base), info)) if is_path else base

    @model_validator(mode="after")
    def _is_consistent(self) -> "Recipe":
        if self.train.packing and self.train.neftune_alpha is not None:
            raise ValueError(
                "train.neftune_alpha cannot be used with train.packing, because its noise is scaled by the length of a "
                "row instead of an example"
            )
        if len(set(self.formats)) < len(self.formats):
            raise ValueError("`formats` lists a format twice")
        if self.method is Method.FULL and Format.ADAPTER in self.formats:
            raise ValueError(f"`formats` lists adapter, but `method: {self.method}` trains no adapter")
        implied, named = _ADAPTER_TYPES[self.method], self.adapter.type
        if "method" in self.model_fields_set and implied and named and named is not implied:
            raise ValueError(f"`method: {self.method}` implies adapter.type {implied}, but adapter.type is {named}")
        if self.method is Method.FULL and self.quantization:
            raise ValueError(
                f"`quantization: {self.quantization}` freezes the weights, but `method: full` trains them all"
            )
        if self.merge_dequantized and self.base_quantization is None:
            raise ValueError("`merge_dequantized` requires `method: qlora` or `quantization: nf4`")
        return self

    @property
    def undivided(self) -> str | None:
        """Why several devices cannot divide the weights among them, or None if they can."""
        if self.objective is not Objective.SFT:
            return "a preference is learnt on one device"
        if self.base_quantization is not None:
            return f"weights in {self.base_quantization} cannot be divided among devices"
        if self.adapter_type not in (None, AdapterType.LORA, AdapterType.DORA):
            return f"{self.adapter_type} cannot be divided among devices; lora, dora and full can"
        if self.train.optimizer is not Optimizer.ADAMW:
            return f"the moments of {self.train.optimizer} cannot be divided among devices; those of adamw can"
        return None

    @model_validator(mode="after")
    def _divides_weights(self) -> "Recipe":
        if self.train.sharding is Sharding.ALWAYS and self.undivided:
            raise ValueError(f"`train.sharding: always` cannot be used: {self.undivided}")
        return self

    @model_validator(mode="after")
    def _fits_method(self) -> "Recipe":
        """Reject adapter keys that the method ignores, because users would expect them to have an effect."""
        given, kind = self.adapter.model_fields_set, self.adapter_type
        if unused := given & _UNUSED.get(kind, frozenset()) if kind else given:
            raise ValueError(f"adapter.{min(unused)} is not used by {kind or f'`method: {self.method}`'}")
        return self

    @model_validator(mode="after")
    def _fits_objective(self) -> "Recipe":
        """Reject keys that the objective ignores or cannot honour."""
        objective = self.objective
        changed = {key for key, value in self.preference if value != Preference.model_fields[key].default}
        if unused := changed - _PREFERENCE_KEYS[objective]:
            raise ValueError(f"preference.{min(unused)} is not used by `objective: {objective}`")
        if (self.preference.loss is DpoLoss.ROBUST) is not (self.preference.label_smoothing > 0):
            raise ValueError("`preference.loss: robust` and preference.label_smoothing must be set together")
        if objective is Objective.SFT:
            return self
        reasons = {
            "train.packing": self.train.packing and "answers are compared in separate rows",
            "train.devices": self.train.devices not in (None, 1) and "a preference is learnt on one device",
            "train.neftune_alpha": self.train.neftune_alpha and "its noise would change the compared likelihoods",
            "adapter.dropout": self.adapter.dropout and "it would change the compared likelihoods at random",
            "train.too_long: truncate": self.train.too_long is TooLong.TRUNCATE
            and "a truncated answer is not the judged one; use drop",
            "data.general": self.data.general and "general examples have no judged answers",
            "data.learn": self.data.learn is not Learn.ALL and "only final answers are judged",
        }
        if refused := next((f"{key} cannot be used: {reason}" for key, reason in reasons.items() if reason), None):
            raise ValueError(f"with `objective: {objective}`, {refused}")
        return self

    def flat(self) -> dict[str, str]:
        """Return the recipe values that affect the result, as strings keyed by dotted key. Unset keys have the
        method's default.

        An unset learning rate is given as None, because its default depends on the base (`with_learning_rate`).
        """
        others = dict.fromkeys(("checkpoints", "data", "judge", "report_to", "sweep"), True)
        sections = self.model_dump(mode="json", exclude=others | {"train": DEVICE_KEYS})
        used = _PREFERENCE_KEYS[self.objective]
        sections["preference"] = {key: value for key, value in sections["preference"].items() if key in used}
        chosen: dict[str, Any] = {}
        if self.adapter_type is None:
            sections.pop("adapter")
        else:
            chosen |= {"adapter.type": self.adapter_type, "adapter.rank": self.rank, "adapter.alpha": self.alpha}
            chosen |= {"quantization": self.base_quantization}
        keys: dict[str, Any] = {}
        for name, section in sections.items():
            if isinstance(section, dict):
                keys |= {f"{name}.{key}": value for key, value in section.items()}
            else:
                keys[name] = section
        return {key: str(value) for key, value in (keys | chosen).items()}

    @property
    def adapter_type(self) -> AdapterType | None:
        """The adapter type, taken from `adapter.type` or else implied by the method. It is None if all weights are
        trained.
        """
        implied = _ADAPTER_TYPES[self.method]
        return implied and (self.adapter.type or implied)

    @property
    def base_quantization(self) -> Quantization | None:
        """Quantization of the frozen weights during training."""
        return self.quantization or (Quantization.NF4 if self.method is Method.QLORA else None)

    def learning_rate(self, width: int) -> float:
        """Return the learning rate set in the recipe, or else `usual_learning_rate`.

        Args:
            width: width of the base's hidden states.
        """
        return self.train.learning_rate or self.usual_learning_rate(width)

    def usual_learning_rate(self, width: int) -> float:
        """Return the default learning rate for a base of the given width. It depends on the objective and the
        adapter type, or on whether all weights are trained.

        The rate falls with the square root of the width. This lies between the exponents of "LoRA Without
        Regret" for Llama (0.78) and Qwen (0.08), and within the usual rates for models from 1B to 70B.
        """
        rate = _LEARNING_RATES.get(self.adapter_type, 5e-4) * min(1.0, math.sqrt(_MEASURED_WIDTH / width))
        if shares := _PREFERENCE_RATES.get(self.objective):
            rate *= shares[self.adapter_type is None]
        return float(f"{rate:.2g}")

    def changed(self, values: Mapping[str, Any], *, without: str | None = None) -> "Recipe":
        """Return a copy of the recipe with the given values changed. Values are keyed by dotted key.

        Args:
            without: a section to omit.

        Raises:
            ValidationError: a value is not valid for its key, or is inconsistent with other values.
        """
        content = self.model_dump(exclude_unset=True, exclude={without} if without else None)
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            (content.setdefault(section, {}) if section else content)[name] = value
        return Recipe.model_validate(content)

    def with_learning_rate(self, width: int) -> "Recipe":
        """Return a copy of the recipe with an explicit learning rate for a base of the given width, so that runs
        record it.
        """
        train = self.train.model_copy(update={"learning_rate": self.learning_rate(width)})
        return self.model_copy(update={"train": train})

    @property
    def rank(self) -> int:
        """The adapter's rank, or the default rank of its type if the recipe sets none."""
        return self.adapter.rank or (256 if self.adapter_type is AdapterType.VERA else 16)

    @property
    def alpha(self) -> int:
        """The adapter's alpha, or twice its rank if the recipe sets none."""
        return self.adapter.alpha or 2 * self.rank

    @property
    def initial_rank(self) -> int:
        """AdaLoRA's initial rank in every layer, which is 1.5 times the final average rank, as in its paper."""
        return math.ceil(1.5 * self.rank)
