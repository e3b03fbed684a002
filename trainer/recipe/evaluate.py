"""The `evaluate`, `judge` and `qualify` sections of a recipe, which define how a version is evaluated."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from svc.evaluation.metrics.choose import MetricOptions
from svc.evaluation.metrics.function import FunctionSpec
from trainer.recipe.paths import Metrics, Name, beside_recipe, metric_beside_recipe
from trainer.recipe.section import Section


class Judge(Section):
    """A model that compares the merged model's answers with the base's; see
    [evaluation](evaluation.md#a-judge).
    """

    url: str | None = None
    """OpenAI-compatible endpoint of the judge, for example `https://api.openai.com/v1`; it receives prompts,
    reference answers and answers; default: no judge"""
    model: str | None = None
    """name of the judge model at this endpoint"""
    key_file: Annotated[Path, AfterValidator(beside_recipe)] | None = None
    """file that contains the API key and has owner-only permissions; default: no key"""

    @model_validator(mode="after")
    def _is_complete(self) -> "Judge":
        if (self.url is None) is not (self.model is None) or (self.key_file and self.url is None):
            raise ValueError("judge.url and judge.model must be set together")
        return self


class Undecided(StrEnum):
    """What to do with a version if a gate's confidence interval neither proves nor rules out that quality dropped by
    more than the gate's limit.
    """

    WARN = "warn"
    FAIL = "fail"


class Evaluate(Section):
    """Evaluation of the base, merged and quantized models on the engine."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """number of held-out examples to evaluate, drawn at random with `data.seed`; default: all"""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """maximum length of an answer in tokens; default: 1.5 times the length of the example's reference answer
    plus 16, see [evaluation](evaluation.md#how-long-an-answer-may-be)"""
    metrics: Metrics | None = None
    """metrics for scoring the answers: names, `rouge` for all three ROUGE metrics, or functions
    (`./FILE.py:FUNCTION`); default: the metrics of the task, see [evaluation](evaluation.md)"""
    primary: Annotated[Name, AfterValidator(metric_beside_recipe)] | None = None
    """metric to which `evaluate.max_gptq_loss` applies and that monitoring measures repeatedly; default: the task's
    primary metric"""
    json_schema: Annotated[Path, AfterValidator(beside_recipe)] | None = None
    """file with the JSON Schema for the `schema_valid` metric; default: inferred from the held-out answers"""
    metric_seconds: float = Field(60.0, gt=0)
    """total time that a metric function may take to score all answers, in seconds"""
    max_gptq_loss: float = Field(0.05, ge=0, le=1)
    """largest amount by which quantization (to GPTQ or any other format) may worsen the primary metric; as a share of
    the merged model's value if the metric itself is not a share (for example perplexity); a version is rejected if a
    larger change for the worse is proven"""
    # 4 bits cost SmolLM2-135M 0.042 [0.033, 0.053] on free text (synopsis task), and nothing of its ROUGE.
    max_gptq_nll: float = Field(0.05, ge=0)
    """largest amount by which quantization (to GPTQ or any other format) may increase the negative log-likelihood, as a
    share of the merged model's value; increases up to 0.005 nats per token are always allowed; a version is rejected if
    a larger increase is proven"""

    general: Annotated[bool | Path, AfterValidator(beside_recipe)] = True
    """ask the base, merged and quantized models general questions, which are never used for training: true for the
    built-in questions, a file with your own, or false for none; see [evaluation](evaluation.md#forgetting)"""
    general_limit: Annotated[int, Field(ge=1)] | None = 60
    """maximum number of general questions, taken from the start of the list; null: all"""
    max_forgetting: Annotated[float, Field(ge=0, le=1)] | None = None
    """largest allowed drop in correct answers to general questions, as a share of all questions, for the merged model
    and each quantized model compared with the base; a version is rejected if a larger drop is proven; default:
    no limit"""
    undecided: Undecided = Undecided.WARN
    """warn or fail: what to do with a version if too few examples were evaluated to decide whether `max_gptq_loss`,
    `max_gptq_nll` or `max_forgetting` is exceeded; see [evaluation](evaluation.md#verdicts)"""

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


class Qualify(Section):
    """Probes that verify, each time the version is loaded, that the engine is running exactly the version's weights."""

    repeats: int = Field(10, ge=1)
    """number of measurements of each probe; the tolerance of later checks is based on how much the
    measurements differ"""
    restart: bool = True
    """also measure on a second engine, to verify that weights loaded in place and weights loaded at start give
    the same results"""
