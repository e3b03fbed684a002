"""The recipe: what to train, as YAML. Every key has a default but `name`, `base` and `data.train`.

Unknown keys and wrong types are errors, because a misspelt hyperparameter that is ignored costs a night of training.
"""

import difflib
import math
from collections.abc import Sequence
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
from svc.evaluation.metrics.choose import MetricOptions
from svc.evaluation.metrics.function import FunctionSpec
from svc.model_folder.chat_template import TemplateValue
from svc.version import NAME_PATTERN, Format
from trainer.recipe.targets import Targets


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _beside_recipe(path: Path | None, info: ValidationInfo) -> Path | None:
    """Paths in a recipe are relative to the recipe, so that it runs from any working folder."""
    folder = (info.context or {}).get("folder", Path())
    try:
        return None if path is None else (folder / path.expanduser()).absolute()
    except RuntimeError as error:
        raise ValueError(f"no user of this machine has the home folder of {path}") from error


def _as_sources(value: Any) -> Any:
    """One source is a list of one."""
    return [str(value)] if isinstance(value, str | Path) else value


def _sources_beside_recipe(sources: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    return tuple(
        source if source.startswith(HUB_PREFIX) else str(_beside_recipe(Path(source), info)) for source in sources
    )


def _file_beside_recipe(value: bool | Path, info: ValidationInfo) -> bool | Path:
    return value if isinstance(value, bool) else _beside_recipe(value, info) or value


_NAME = Annotated[str, Field(min_length=1)]
Sources = Annotated[
    tuple[_NAME, ...],
    BeforeValidator(_as_sources),
    AfterValidator(_sources_beside_recipe),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""Files, folders, or hub datasets as hf:ORG/NAME; one of them may stand alone."""


def _metric_beside_recipe(name: str | None, info: ValidationInfo) -> str | None:
    """A metric that is a function has its file beside the recipe; any other is a name."""
    spec = name and FunctionSpec.parse(name)
    return f"{_beside_recipe(spec.path, info)}:{spec.function}" if spec else name


def _metrics_beside_recipe(names: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
    return names and tuple(_metric_beside_recipe(name, info) or name for name in names)


Metrics = Annotated[
    tuple[_NAME, ...],
    BeforeValidator(_as_sources),
    AfterValidator(_metrics_beside_recipe),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""Names, or functions as `./FILE.py:FUNCTION`; one of them may stand alone."""


class Data(_Section):
    """Where the examples are: files, folders, or hub datasets as `hf:ORG/NAME`; see [data](data.md)."""

    train: Sources
    """what to learn"""
    heldout: Sources | None = None
    """never trained on; the version is judged by it; default: a part of `data.train`"""
    heldout_share: float = Field(0.1, gt=0, lt=1)
    """share of `data.train` that is held out, where `data.heldout` names nothing"""
    general: Sources | None = None
    """general examples to mix in, against forgetting"""
    general_share: float = Field(0.1, gt=0, lt=1)
    """share of the training examples that are general ones"""
    seed: int = Field(0, ge=0)
    """decides what is held out, and which general examples are taken"""
    skip: int = Field(0, ge=0)
    """leave out the first so many training examples"""
    limit: Annotated[int, Field(ge=2)] | None = None
    """train on so many examples only; default all"""


class AdapterType(StrEnum):
    """How an adapter changes a layer."""

    LORA = "lora"
    """A low-rank update beside frozen weights (Hu et al. 2021)."""
    DORA = "dora"
    """LoRA for the direction, and a magnitude for each output (Liu et al. 2024)."""
    ADALORA = "adalora"
    """LoRA whose ranks are shared out between layers while it trains (Zhang et al. 2023)."""
    VERA = "vera"
    """Two vectors a layer beside random matrices that all layers share (Kopiczko et al. 2023)."""


class Quantization(StrEnum):
    """In which form the frozen weights are kept while an adapter trains beside them."""

    NF4 = "nf4"
    """Four bits, with quantized scales (Dettmers et al. 2023)."""


class Method(StrEnum):
    """The customary name of an adapter's type and the base's quantization together, or of training all weights."""

    FULL = "full"
    """Every weight."""
    LORA = "lora"
    """Low-rank updates beside frozen weights (Hu et al. 2021)."""
    QLORA = "qlora"
    """LoRA beside weights that are frozen in 4 bits (Dettmers et al. 2023): a quarter of the memory."""
    DORA = "dora"
    """LoRA for the direction, and a magnitude for each output (Liu et al. 2024)."""
    ADALORA = "adalora"
    """LoRA whose ranks are shared out between layers while it trains (Zhang et al. 2023)."""
    VERA = "vera"
    """Two vectors a layer beside random matrices that all layers share (Kopiczko et al. 2023)."""


class Adapter(_Section):
    """The adapter; nothing of it is used by `method: full`."""

    type: AdapterType | None = None
    """how it changes a layer: lora, dora, adalora or vera; default as `method` says"""
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """width of the update: more learns more, and costs more memory; default 16, for vera 256"""
    alpha: Annotated[int, Field(ge=1)] | None = None
    """scale: the update is multiplied by alpha / rank; default twice the rank; vera has none"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """share of the adapter's inputs left out in a step"""
    targets: Targets = Targets.ALL_LINEAR
    """layers: attention-min is query and value"""
    rslora: bool = False
    """scale by alpha / sqrt(rank), so that large ranks learn as fast; LoRA only"""


class Schedule(StrEnum):
    """How the step size moves after the warmup."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class TooLong(StrEnum):
    """What becomes of an example that is longer than `train.max_length`."""

    ERROR = "error"
    DROP = "drop"
    TRUNCATE = "truncate"


class Optimizer(StrEnum):
    """What steps on the trained weights, and where its two moments of each weight are stored."""

    ADAMW = "adamw"
    """AdamW with moments in float32 (Loshchilov and Hutter 2019)."""
    ADAMW_8BIT = "adamw-8bit"
    """AdamW with moments in 8 bits, in blocks of 256 with a scale each (Dettmers et al. 2022); of bitsandbytes."""
    PAGED_ADAMW = "paged-adamw"
    """AdamW whose moments leave a full GPU for main memory (Dettmers et al. 2023); of bitsandbytes."""
    PAGED_ADAMW_8BIT = "paged-adamw-8bit"
    """Both."""

    @property
    def is_8bit(self) -> bool:
        """Whether moments have 8 bits."""
        return self in (Optimizer.ADAMW_8BIT, Optimizer.PAGED_ADAMW_8BIT)

    @property
    def is_paged(self) -> bool:
        """Whether moments can leave the GPU."""
        return self in (Optimizer.PAGED_ADAMW, Optimizer.PAGED_ADAMW_8BIT)


class Train(_Section):
    """The optimizer's run."""

    optimizer: Optimizer = Optimizer.ADAMW
    """adamw, adamw-8bit, paged-adamw or paged-adamw-8bit: 8-bit moments take a quarter of the memory, paged ones leave
    a full GPU; see [training](training.md#optimizers)"""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """largest step size; default 5e-4, adalora 1e-2, vera 6e-2, full 5e-5"""
    schedule: Schedule = Schedule.LINEAR
    """falls to 0, or stays"""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """share of the steps in which the step size rises"""
    epochs: float = Field(1.0, gt=0)
    """passes over the examples"""
    steps: Annotated[int, Field(ge=1)] | None = None
    """so many steps, whatever `epochs` says"""
    batch_size: int = Field(16, ge=1)
    """examples at once on a device"""
    gradient_accumulation: int = Field(1, ge=1)
    """batches a step: less memory than a larger batch"""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's"""
    max_grad_norm: float = Field(1.0, gt=0)
    """a longer gradient is shortened to it"""
    max_length: int = Field(1024, ge=16)
    """tokens of the longest example"""
    too_long: TooLong = TooLong.ERROR
    """what becomes of a longer example: with truncate its end is not learnt; `--skip-bad` drops it"""
    packing: bool = False
    """several examples in one row of max_length tokens, blind to each other; a row is an example"""
    gradient_checkpointing: bool | None = None
    """compute activations again instead of keeping them; default on a GPU, not on a CPU"""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """noise on the embeddings (Jain et al. 2023), customarily 5; default none"""
    seed: int = Field(0, ge=0, lt=2**32)
    """decides the order of examples and the adapter's start"""


class Stopping(_Section):
    """Held-out loss while it trains. A set that chooses among weights flatters them a little."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """steps between two measurements; default a tenth of all, where the other keys ask for any"""
    patience: Annotated[int, Field(ge=1)] | None = None
    """stop after so many measurements without a lower loss; default never"""
    keep_best: bool = False
    """end with the weights of the lowest held-out loss, not with the last"""
    curve: bool = True
    """where no other key asks for it: held-out loss up to six times on up to 64 examples, as many as cost less than a
    twentieth of the run; up to three times for less than a quarter of a run of 20 to 49 steps; changes no weights"""

    @property
    def measures(self) -> bool:
        """Whether held-out loss is asked for at all."""
        return self.every_steps is not None or self.patience is not None or self.keep_best


class Checkpoints(_Section):
    """What an interrupted training goes on from. None of it changes the result."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """steps between two; default by time only"""
    every_minutes: float = Field(10.0, gt=0)
    """minutes between two"""
    keep: int = Field(2, ge=1)
    """newest that are kept; the best one is kept beside them"""


class Quantize(_Section):
    """GPTQ in 4 bits. `group_size` must divide the model's layer widths: 64 fits most, large models often have 128."""

    group_size: Literal[32, 64, 128] = 64
    """weights that share a scale"""
    samples: int = Field(64, ge=8, le=1024)
    """training examples, cut to `train.max_length`, that calibrate GPTQ"""
    sequential: bool = True
    """a block's layers one after the other, each on what those before it now answer; slower"""


class Judge(_Section):
    """A model that compares the merged model's answers with the base's; see [evaluation](evaluation.md#a-judge)."""

    url: str | None = None
    """OpenAI endpoint, as `https://api.openai.com/v1`: prompts, references and answers are sent there; default: there
    is no judge"""
    model: str | None = None
    """its name there"""
    key_file: Annotated[Path, AfterValidator(_beside_recipe)] | None = None
    """file with its key, which only its owner may read; default: it needs none"""

    @model_validator(mode="after")
    def _is_whole(self) -> "Judge":
        if (self.url is None) is not (self.model is None) or (self.key_file and self.url is None):
            raise ValueError("a judge needs both, judge.url and judge.model")
        return self


class Undecided(StrEnum):
    """What a gate does whose interval neither excludes nor proves a loss beyond its limit."""

    WARN = "warn"
    FAIL = "fail"


class Evaluate(_Section):
    """How base, merged and GPTQ are judged, on the engine."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """so many of the held-out examples, drawn at random by `data.seed`; default all"""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """longest answer, tokens; default by each example's reference: 1.5 times its tokens and 16 more, see
    [evaluation](evaluation.md#how-long-an-answer-may-be)"""
    metrics: Metrics | None = None
    """what the answers are judged by: names, `rouge` for all three, functions as `./FILE.py:FUNCTION`; default by the
    task, see [evaluation](evaluation.md)"""
    primary: Annotated[_NAME, AfterValidator(_metric_beside_recipe)] | None = None
    """the metric that gates GPTQ and that monitoring measures again; default the task's"""
    json_schema: Annotated[Path, AfterValidator(_beside_recipe)] | None = None
    """file of the JSON Schema for `schema_valid`; default inferred from the held-out answers"""
    metric_seconds: float = Field(60.0, gt=0)
    """longest time that a function may take for all answers"""
    max_gptq_loss: float = Field(0.05, ge=0, le=1)
    """of the primary metric, what quantizing may cost; of one that is no share, as perplexity, relative to the merged
    model's; a larger loss that is proven is refused"""
    # 4 bits cost SmolLM2-135M 0.042 [0.033, 0.053] on free text (synopsis task), and nothing of its ROUGE.
    max_gptq_nll: float = Field(0.05, ge=0)
    """negative log-likelihood that quantizing may add, as a share of the merged model's; at least 0.005 nats; a larger
    loss that is proven is refused"""

    general: Annotated[bool | Path, AfterValidator(_file_beside_recipe)] = True
    """ask base and merged model general questions, which are never trained on: true for those of this package, a file
    for your own, false for none; see [evaluation](evaluation.md#forgetting)"""
    general_limit: Annotated[int, Field(ge=1)] | None = 60
    """so many of the first general questions; null: all"""
    max_forgetting: Annotated[float, Field(ge=0, le=1)] | None = None
    """share of right general answers that training may cost; a larger loss that is proven is refused; default: no
    limit"""
    undecided: Undecided = Undecided.WARN
    """warn or fail: what to do with a version if too few examples neither exclude nor prove a loss beyond one of these
    limits; see [evaluation](evaluation.md#verdicts)"""

    @property
    def metric_options(self) -> MetricOptions:
        """What is said of metrics."""
        return MetricOptions(self.metrics, self.primary, self.json_schema, self.metric_seconds)

    @property
    def metric_files(self) -> tuple[Path, ...]:
        """The files of the user's that judge."""
        named = (*(self.metrics or ()), *([self.primary] if self.primary else []))
        functions = [spec.path for name in named if (spec := FunctionSpec.parse(name))]
        return (*functions, *([self.json_schema] if self.json_schema else []))


class Qualify(_Section):
    """The probes that verify, at every later load, that the engine runs these weights."""

    repeats: int = Field(20, ge=1)
    """measurements of the engine's own noise, which is the tolerance's floor"""
    restart: bool = True
    """measure on a second engine too: in place and freshly loaded must agree"""


class ReportTo(StrEnum):
    """Where a run's parameters, curves and figures go."""

    MLFLOW = "mlflow"
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"


class Between(_Section):
    """A range of a search space; of whole numbers where both ends are."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_range(self) -> "Between":
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("a range needs low below high, and with log low above 0")
        return self


class Sweep(_Section):
    """An own search of `svc sweep`, in place of its phases; see [sweep](sweep.md#own-spaces)."""

    space: (
        Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)] | Between], Field(min_length=1)] | None
    ) = None
    """keys of `train` and `adapter`, each with a list of values or `{low: , high: , log: true}`; default: the three
    phases"""
    trials: int = Field(20, ge=1)
    """trainings in an own space; lists with fewer combinations try all"""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """begin no other trial when those before took so long; default no limit"""

    @field_validator("space")
    @classmethod
    def _has_keys(cls, space: dict[str, Any] | None) -> dict[str, Any] | None:
        known = [f"train.{key}" for key in Train.model_fields] + [f"adapter.{key}" for key in Adapter.model_fields]
        for key in space or ():
            if key not in known:
                raise ValueError(f"unknown key {key!r}{suggest(key, known)}; a space has keys of train and adapter")
        return space


def suggest(key: str, known: Sequence[str]) -> str:
    """Return a question for the key that may be meant; empty where none is like it."""
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# Held-out loss after 240 examples of the section task (SmolLM2-135M, 15 steps): lora 0.45; full 0.43; adalora 0.37, at
# 2e-3 2.52; vera 0.36, at 2e-2 0.73. Their vectors start at or near 0, and Adam moves each by no more than the rate.
_LEARNING_RATES = {None: 5e-5, AdapterType.ADALORA: 1e-2, AdapterType.VERA: 6e-2}
_UNUSED = {AdapterType.VERA: frozenset({"alpha", "rslora"}), AdapterType.ADALORA: frozenset({"rslora"})}
"""Keys of `adapter` that a type has no use for."""
_ADAPTER_TYPES = {Method.FULL: None, Method.QLORA: AdapterType.LORA} | {
    method: AdapterType(method) for method in Method if method not in (Method.FULL, Method.QLORA)
}


class Recipe(_Section):
    """One model to train."""

    name: str = Field(pattern=NAME_PATTERN)
    """the model's name for clients"""
    base: str = Field(min_length=1)
    """known id, hub id, NAME@N, local folder or GGUF file"""
    method: Method = Method.LORA
    """full, lora, qlora, dora, adalora or vera; or leave it out and say `adapter.type` and `quantization`, as for
    QDoRA"""
    quantization: Quantization | None = None
    """nf4: the frozen weights in 4 bits while it trains; default as `method` says"""
    chat_template_kwargs: dict[str, TemplateValue] | None = None
    """given to the base's chat template in training, evaluation and serving; default: `enable_thinking: false` and
    `date_string: 26 Jul 2024`, where the template knows them"""
    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = (Format.MERGED, Format.GPTQ)
    """adapter, merged, gptq: what is made, judged and registered; an adapter is always kept. Without merged the base is
    not judged either"""
    report_to: tuple[ReportTo, ...] = (ReportTo.MLFLOW,)
    """mlflow, wandb, tensorboard: where parameters, losses and figures go; MLflow always has them"""
    data: Data
    adapter: Adapter = Adapter()
    train: Train = Train()
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
        """A base that is written as a path is one."""
        is_path = base.startswith((".", "/", "~")) or base.endswith(".gguf")
        return str(_beside_recipe(Path(base), info)) if is_path else base

    @model_validator(mode="after")
    def _says_one_thing(self) -> "Recipe":
        if self.train.packing and self.train.neftune_alpha is not None:
            raise ValueError(
                "train.neftune_alpha with train.packing: its noise is scaled by the length of a row, not of an example"
            )
        if len(set(self.formats)) < len(self.formats):
            raise ValueError("formats names one twice")
        if self.method is Method.FULL and Format.ADAPTER in self.formats:
            raise ValueError(f"formats names adapter, and method {self.method} trains none")
        meant, said = _ADAPTER_TYPES[self.method], self.adapter.type
        if "method" in self.model_fields_set and meant and said and said is not meant:
            raise ValueError(f"method {self.method} means adapter.type {meant}, and adapter.type is {said}")
        if self.method is Method.FULL and self.quantization:
            raise ValueError(f"quantization {self.quantization} keeps weights frozen, and method full trains them all")
        return self

    @model_validator(mode="after")
    def _fits_method(self) -> "Recipe":
        """A key that the method has no use for would be believed to have one."""
        given, kind = self.adapter.model_fields_set, self.adapter_type
        if unused := given & _UNUSED.get(kind, frozenset()) if kind else given:
            raise ValueError(f"adapter.{min(unused)} means nothing for {kind or f'method {self.method}'}")
        return self

    def flat(self) -> dict[str, str]:
        """What decides the result, by dotted key, as text; keys that were left to the method with what it chose."""
        sections = self.model_dump(mode="json", exclude={"checkpoints", "data", "judge", "report_to", "sweep"})
        chosen: dict[str, Any] = {"train.learning_rate": self.learning_rate}
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
        """As `adapter.type` says, else as the method does; None where every weight is trained."""
        meant = _ADAPTER_TYPES[self.method]
        return meant and (self.adapter.type or meant)

    @property
    def base_quantization(self) -> Quantization | None:
        """Of the frozen weights while it trains."""
        return self.quantization or (Quantization.NF4 if self.method is Method.QLORA else None)

    @property
    def learning_rate(self) -> float:
        """The recipe's, or the default of what is trained."""
        return self.train.learning_rate or self.usual_learning_rate

    @property
    def usual_learning_rate(self) -> float:
        """The default of what is trained."""
        return _LEARNING_RATES.get(self.adapter_type, 5e-4)

    @property
    def rank(self) -> int:
        """The adapter's, or its type's default."""
        return self.adapter.rank or (256 if self.adapter_type is AdapterType.VERA else 16)

    @property
    def alpha(self) -> int:
        """The adapter's, or twice its rank."""
        return self.adapter.alpha or 2 * self.rank

    @property
    def initial_rank(self) -> int:
        """AdaLoRA's rank in every layer before it shares ranks out: 1.5 times the final average, as in its paper."""
        return math.ceil(1.5 * self.rank)
