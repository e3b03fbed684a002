"""The recipe: a YAML description of a model to train. Every key except `name`, `base` and `data.train` has a default.

Unknown keys and wrong types are errors, because ignoring a misspelled hyperparameter could waste an entire training
run.
"""

import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from svc.dataset.schema.objective import Objective
from svc.errors import RecipeError
from svc.model_folder.chat_template import TemplateValue
from svc.version import NAME_PATTERN, Format
from trainer.recipe.adapter import ADAPTER_TYPES, UNUSED_KEYS, Adapter, AdapterType, Method, Quantization
from trainer.recipe.data import Data, Learn
from trainer.recipe.evaluate import Evaluate, Judge, Qualify
from trainer.recipe.named_template import NamedTemplate
from trainer.recipe.paths import ChatTemplate, beside_recipe
from trainer.recipe.preference import PREFERENCE_KEYS, DpoLoss, Preference
from trainer.recipe.quantize import Quantize
from trainer.recipe.rope import RopeScaling
from trainer.recipe.section import Section
from trainer.recipe.sweep import Sweep
from trainer.recipe.train import DEVICE_KEYS, Checkpoints, Optimizer, Sharding, Stopping, TooLong, Train


class ReportTo(StrEnum):
    """Tracker for a run's parameters, curves and metrics."""

    MLFLOW = "mlflow"
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"


# Held-out loss after 240 examples of the section task (SmolLM2-135M, 15 steps): lora 0.45; full 0.43; adalora 0.37, at
# 2e-3 2.52; vera 0.36, at 2e-2 0.73. Their vectors start at or near 0, and Adam moves each by no more than the rate.
_LEARNING_RATES = {None: 5e-5, AdapterType.ADALORA: 1e-2, AdapterType.VERA: 6e-2}
_MEASURED_WIDTH = 576
"""Hidden width of SmolLM2-135M, for which the default learning rates were measured. See docs/training.md for rates for
wider models."""
_PREFERENCE_RATES = {
    Objective.DPO: (0.1, 0.02),
    Objective.KTO: (0.1, 0.02),
    Objective.ORPO: (0.2, 0.2),
}
"""Default learning rate of each preference objective, as a fraction of the rate for supervised fine-tuning: first for
adapters, then for full fine-tuning. The defaults lie between the published rates listed in docs/training.md."""
NewTokens = Annotated[
    tuple[Annotated[str, Field(pattern=r"^\S+$")], ...],
    WithJsonSchema({"type": "array", "items": {"type": "string"}}),
]
"""Strings of new tokens, without spaces."""


class Recipe(Section):
    """A recipe, which describes how to train one model."""

    name: str = Field(pattern=NAME_PATTERN)
    """name under which clients request the model"""
    base: str = Field(min_length=1)
    """base model: a known id, a Hugging Face id, NAME@N, a local folder or a GGUF file"""
    method: Method = Method.LORA
    """full, lora, qlora, dora, adalora or vera; for other combinations, such as QDoRA, set `adapter.type` and
    `quantization` instead"""
    objective: Objective = Objective.SFT
    """sft: learn the reference answers; text: learn all tokens of documents, see [raw text](training.md#raw-text); dpo
    or orpo: learn from pairs of a better and a worse answer; kto: learn from single answers labeled desirable or
    undesirable; see [training](training.md#preferences)"""
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
    new_tokens: NewTokens = ()
    """tokens to add to the tokenizer, such as `[<tool>, </tool>]`, whose embeddings are trained; see
    [training](training.md#new-tokens)"""
    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = (Format.MERGED, Format.GPTQ)
    """formats to create, evaluate and register: adapter, merged, gptq, awq, int8, fp8, gguf, see
    [formats](formats.md); an adapter is always stored. Without `merged`, the base answers only the general questions
    and no held-out examples"""
    report_to: tuple[ReportTo, ...] = (ReportTo.MLFLOW,)
    """trackers for parameters, losses and metrics: mlflow, wandb, tensorboard; MLflow always receives them"""
    data: Data
    adapter: Adapter = Adapter()
    train: Train = Train()
    rope_scaling: RopeScaling = RopeScaling()
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
        return str(beside_recipe(Path(base), info)) if is_path else base

    @model_validator(mode="after")
    def _is_consistent(self) -> "Recipe":
        if self.train.packing and self.train.neftune_alpha is not None:
            raise ValueError(
                "train.neftune_alpha cannot be used with train.packing, because NEFTune would scale its "
                "noise by the length of a row instead of an example"
            )
        if len(set(self.formats)) < len(self.formats):
            raise ValueError("`formats` lists a format twice")
        if Format.GGUF in self.formats and Format.MERGED not in self.formats:
            raise ValueError(
                "`formats` lists `gguf` without `merged`, but the merged model is evaluated in place of the GGUF file"
            )
        if self.method is Method.FULL and Format.ADAPTER in self.formats:
            raise ValueError(f"`formats` lists `adapter`, but `method: {self.method}` trains no adapter")
        implied, named = ADAPTER_TYPES[self.method], self.adapter.type
        if "method" in self.model_fields_set and implied and named and named is not implied:
            raise ValueError(f"`method: {self.method}` implies adapter.type {implied}, but adapter.type is {named}")
        if self.method is Method.FULL and self.quantization:
            raise ValueError(
                f"`quantization: {self.quantization}` freezes the weights, but `method: full` trains them all"
            )
        scaling = self.rope_scaling
        if (scaling.type is None) is not (scaling.factor is None) or (scaling.replace and scaling.type is None):
            raise ValueError("`rope_scaling` needs both a type and a factor")
        if scaling.type is not None and Format.GGUF in self.formats:
            raise ValueError("`formats` lists `gguf`, which cannot be written with `rope_scaling`")
        if len(set(self.new_tokens)) < len(self.new_tokens):
            raise ValueError("`new_tokens` lists a token twice")
        if self.adapter.modules_to_save and Format.ADAPTER in self.formats:
            raise ValueError("`formats` lists `adapter`, but vLLM cannot load the layers in adapter.modules_to_save")
        if self.new_tokens and Format.ADAPTER in self.formats:
            raise ValueError(
                "`formats` lists `adapter`, but vLLM cannot load the embeddings of `new_tokens` with an adapter"
            )
        if self.merge_dequantized and self.base_quantization is None:
            raise ValueError("`merge_dequantized` requires `method: qlora` or `quantization: nf4`")
        return self

    @property
    def undivided(self) -> str | None:
        """Reason why the weights cannot be sharded across devices, or None if they can."""
        if self.adapter_type not in (None, AdapterType.LORA, AdapterType.DORA):
            return f"{self.adapter_type} cannot be sharded across devices, unlike lora, dora and full"
        if self.train.optimizer is not Optimizer.ADAMW:
            return f"the moments of {self.train.optimizer} cannot be sharded across devices, unlike adamw's"
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
        if unused := given & UNUSED_KEYS.get(kind, frozenset()) if kind else given:
            raise ValueError(f"adapter.{min(unused)} is not used by {kind or f'`method: {self.method}`'}")
        if self.train.lora_plus_ratio is not None and kind not in (AdapterType.LORA, AdapterType.DORA):
            raise ValueError(f"train.lora_plus_ratio is not used by {kind or f'`method: {self.method}`'}")
        if self.new_tokens and kind not in (None, AdapterType.LORA, AdapterType.DORA):
            raise ValueError(f"new_tokens cannot be trained with {kind}, only with lora, qlora, dora or full")
        if self.adapter.starts_from_base and self.base_quantization:
            raise ValueError(
                f"`adapter.init: {self.adapter.init}` changes the base's weights, but `quantization: "
                f"{self.base_quantization}` stores them in 4 bits"
            )
        if self.adapter.starts_from_base and self.adapter.rslora:
            raise ValueError(f"adapter.rslora cannot be used with `adapter.init: {self.adapter.init}`")
        return self

    @model_validator(mode="before")
    @classmethod
    def _text_defaults(cls, content: Any) -> Any:
        """Set the values that `objective: text` requires. If the recipe sets other values, they are left unchanged and
        rejected later.
        """
        if not isinstance(content, dict) or content.get("objective") != Objective.TEXT:
            return content
        evaluate = content.get("evaluate") or {}
        evaluate = {"general": False, **evaluate} if isinstance(evaluate, dict) else evaluate
        return {"chat_template": NamedTemplate.TEXT, **content, "evaluate": evaluate}

    def _fits_text(self) -> None:
        """Reject keys that have no effect on documents, because documents have no turns and no answers."""
        evaluate, answers = self.evaluate, "no answers to documents are generated"
        reasons = {
            "chat_template": self.chat_template is not NamedTemplate.TEXT and "documents have no turns",
            "chat_template_kwargs": self.chat_template_kwargs and "documents have no turns",
            "data.learn": "learn" in self.data.model_fields_set and "all tokens are trained on",
            "train.too_long": self.train.too_long is not TooLong.ERROR and "documents are cut into rows of max_length",
            "evaluate.metrics": evaluate.metrics and answers,
            "evaluate.primary": evaluate.primary and answers,
            "evaluate.json_schema": evaluate.json_schema and answers,
            "evaluate.max_tokens": evaluate.max_tokens and answers,
            "evaluate.general": evaluate.general is not False and "questions need a chat template",
            "judge.url": self.judge.url and answers,
        }
        if refused := next((f"{key} cannot be used: {reason}" for key, reason in reasons.items() if reason), None):
            raise ValueError(f"with `objective: text`, {refused}")

    @model_validator(mode="after")
    def _fits_objective(self) -> "Recipe":
        """Reject keys that the objective ignores or does not support."""
        objective = self.objective
        if objective is Objective.TEXT:
            self._fits_text()
        changed = {key for key, value in self.preference if value != Preference.model_fields[key].default}
        if unused := changed - PREFERENCE_KEYS[objective]:
            raise ValueError(f"preference.{min(unused)} is not used by `objective: {objective}`")
        if (self.preference.loss is DpoLoss.ROBUST) is not (self.preference.label_smoothing > 0):
            raise ValueError("`preference.loss: robust` and preference.label_smoothing must be set together")
        if not objective.is_preference:
            return self
        reasons = {
            "train.packing": self.train.packing and "answers are compared in separate rows",
            "train.neftune_alpha": self.train.neftune_alpha and "its noise would change the compared likelihoods",
            "adapter.dropout": self.adapter.dropout and "it would change the compared likelihoods at random",
            "train.too_long: truncate": self.train.too_long is TooLong.TRUNCATE
            and "the preference does not apply to a truncated answer; use drop",
            "data.general": self.data.general and "general examples have no preferences",
            "data.learn": self.data.learn is not Learn.ALL and "only final answers are compared",
        }
        if refused := next((f"{key} cannot be used: {reason}" for key, reason in reasons.items() if reason), None):
            raise ValueError(f"with `objective: {objective}`, {refused}")
        return self

    @model_validator(mode="after")
    def _has_examples(self) -> "Recipe":
        """Reject a recipe without training examples. They are optional only if the adapter is already trained."""
        if self.adapter.trained and self.adapter.combine:
            raise ValueError("adapter.trained and adapter.combine cannot be used together: set one of them")
        if not self.adapter.given:
            if not self.data.train:
                raise ValueError("'data.train' is missing")
            return self
        if self.objective.is_preference:
            raise ValueError(f"`objective: {self.objective}` has no effect if {self.adapter.given} is set")
        if self.adapter.init is not None:
            raise ValueError(f"`adapter.init: {self.adapter.init}` has no effect if {self.adapter.given} is set")
        if self.new_tokens or self.adapter.modules_to_save:
            key = "new_tokens" if self.new_tokens else "adapter.modules_to_save"
            raise ValueError(f"`{key}` has no effect if {self.adapter.given} is set")
        if not self.data.train and not self.data.heldout:
            raise ValueError("'data.heldout' is missing: a version is evaluated on held-out examples")
        calibrated = next((format for format in self.formats if format in (Format.GPTQ, Format.AWQ)), None)
        if not self.data.train and calibrated:
            raise ValueError(
                f"`formats` lists {calibrated}, which needs data.train for calibration; set formats: [merged]"
            )
        return self

    def require_training(self, command: str) -> None:
        """Reject a recipe whose adapter is already trained.

        Raises:
            RecipeError: `adapter.trained` or `adapter.combine` is set.
        """
        if given := self.adapter.given:
            raise RecipeError(
                f"{given} is set: {command} has nothing to train",
                todo=f"register the adapter with `svc train`, or remove {given}",
            )

    def flat(self) -> dict[str, str]:
        """Return the recipe values that affect the result, as strings keyed by dotted key. Unset keys take the method's
        default.

        An unset learning rate is returned as None, because its default depends on the base (`with_learning_rate`).
        """
        others = dict.fromkeys(("checkpoints", "data", "judge", "report_to", "sweep"), True)
        sections = self.model_dump(mode="json", exclude=others | {"train": DEVICE_KEYS})
        used = PREFERENCE_KEYS[self.objective]
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
        implied = ADAPTER_TYPES[self.method]
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
        """Return the default learning rate for a base of the given width. The rate also differs between
        objectives, between adapter types, and for full fine-tuning.

        The rate is inversely proportional to the square root of the width. This exponent, 0.5, lies between the
        exponents of "LoRA Without Regret" for Llama (0.78) and Qwen (0.08). For models from 1B to 70B, it gives rates
        in the usual range.
        """
        rate = _LEARNING_RATES.get(self.adapter_type, 5e-4) * min(1.0, math.sqrt(_MEASURED_WIDTH / width))
        if shares := _PREFERENCE_RATES.get(self.objective):
            rate *= shares[self.adapter_type is None]
        return float(f"{rate:.2g}")

    def changed(self, values: Mapping[str, Any], *, without: str | None = None) -> "Recipe":
        """Return a copy of the recipe with the given values changed.

        Args:
            values: new values, keyed by recipe key, for example `train.learning_rate`.
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
        """Return a copy of the recipe in which the learning rate for a base of the given width is set explicitly, so
        that it is recorded with a run.
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
