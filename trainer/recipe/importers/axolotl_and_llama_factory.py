"""The rules by which configs of Axolotl (https://docs.axolotl.ai/docs/config-reference.html) and LLaMA-Factory
(https://llamafactory.readthedocs.io/en/latest/advanced/arguments.html) are imported, and their converters.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from svc.dataset.readers.source import HUB_PREFIX
from svc.dataset.schema.objective import Objective
from svc.errors import RecipeError
from svc.files.json_file import read_json_object
from trainer.recipe.adapter import GAUSSIAN, AdapterType, Method, Quantization, TokenLayer
from trainer.recipe.data import Learn
from trainer.recipe.importers.draft import Convert, Draft, Rule, Tool
from trainer.recipe.named_template import NamedTemplate
from trainer.recipe.preference import DpoLoss
from trainer.recipe.recipe import ReportTo
from trainer.recipe.rope import RopeType
from trainer.recipe.targets import Targets
from trainer.recipe.train import Optimizer, Schedule, TooLong

_KINDS: dict[str, dict[str, Any]] = {
    "rl": {"dpo": Objective.DPO, "ipo": Objective.DPO, "orpo": Objective.ORPO, "kto": Objective.KTO},
    "stage": {"sft": Objective.SFT, "pt": Objective.TEXT, "dpo": Objective.DPO, "kto": Objective.KTO},
    "pref_loss": {"sigmoid": DpoLoss.SIGMOID, "ipo": DpoLoss.IPO, "orpo": None},
    "adapter": {"lora": Method.LORA, "qlora": Method.QLORA, "null": Method.FULL},
    "finetuning_type": {"lora": Method.LORA, "full": Method.FULL},
}
"""Values of keys that decide whether a config can be imported at all."""
_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), Optimizer.ADAMW),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"), Optimizer.ADAMW_8BIT),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), Optimizer.PAGED_ADAMW),
    "paged_adamw_8bit": Optimizer.PAGED_ADAMW_8BIT,
}
_SCHEDULES = {"constant_with_warmup": Schedule.CONSTANT}
_PRESETS = {
    frozenset({"q_proj", "v_proj"}): Targets.ATTENTION_MIN,
    frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}): Targets.ATTENTION,
    frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}): Targets.ALL_LINEAR,
}
_COMPLETION = "completion"
_LOADERS = ("json", "csv", "parquet", "text")
"""Loaders of Hugging Face's datasets, which stand in place of a dataset's path."""
_READ_KEYS = {"path", "type", "split", "name", "data_files", "ds_type", "revision", "chat_template"}
_USUAL_COLUMNS: dict[str, tuple[Any, ...]] = {
    **{name: (name,) for name in ("history", "system", "tools", "chosen", "rejected")},
    "messages": ("messages", "conversations"),
    "kto_tag": ("kto_tag", "label"),
    "prompt": ("instruction", "prompt", "text"),
    "query": ("input",),
    "response": ("output", "completion"),
    "field": ("text",),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"]),
    "train_on_eos": ("turn",),
    "shuffle": (True,),
    "trust_remote_code": (True, False),
}
"""Keys of a dataset in either tool, without Axolotl's `field_`, and the values that need no note, because the readers
of `svc.dataset` find these columns by themselves."""
_DATASET_INFO = "dataset_info.json"

# Notes on keys that are left out or changed
_ROPE = f"{{}}; set rope_scaling with a type ({', '.join(RopeType)}) and a factor above 1"
_SHARE = "set data.heldout_share to {} divided by the number of examples"
_NO_HELDOUT = "a tenth of the examples is held out, because every version is evaluated"
_CONTINUED = "training starts from the base; `base: NAME@N` continues from a version"
_SIXTEEN_BITS = "the frozen weights are in 16 bits; method: qlora stores them in 4 bits"
_PATTERN = "a pattern for layer names; list the last part of each layer name in adapter.targets"
_INIT = "{} is not available; see adapter.init in docs/recipe.md for the available values"
_RANDOM = "false would initialize both adapter matrices with random values, which is not available"
_WHOLE_LAYERS = f"besides the adapted layers, only {' and '.join(TokenLayer)} can be trained"
_NOT_SPECIAL = "the new tokens are not special tokens here, so they are not removed from answers"
_PER_GPU = "the imported value is per GPU, but here it is the total for all GPUs: multiply it by the number of GPUs"
_SEVERAL_GPUS = "training on several GPUs is set with train.devices and train.sharding"
_OPTIMIZER = "{} is not available; adamw is used"
_SCHEDULE = f"{{}} is not available; set train.schedule to one of {', '.join(Schedule)}"
_STEPS = "set {to} to a number of steps"
_REPLACED = "{!r} was replaced by the base's own template; check that both are the same"
_TEMPLATE_TEXT = "save the template to a file, and set chat_template to ./FILE.jinja"
_ALPACA_ADDED = (
    "`chat_template: alpaca` was added, because Axolotl's alpaca format puts prompts under Alpaca's headings; "
    "its introduction is the same with and without input; remove the key to use the base's own template"
)


def _supported(key: str, name: str) -> Any:
    """Return what a value stands for.

    Raises:
        RecipeError: the config is of a kind that cannot be imported.
    """
    if name not in _KINDS[key]:
        raise RecipeError(f"the config sets `{key}: {name}`", expected=f"one of {', '.join(_KINDS[key])}")
    return _KINDS[key][name]


def _rejected(task: str) -> Convert:
    """Return a converter that rejects the config, if the key is set."""

    def reject(draft: Draft, key: str, value: Any) -> None:
        expected = "a text model that is trained on examples or preferences"
        raise RecipeError(f"the config is for training {task} ({key})", expected=expected)

    return reject


def _renamed(names: Mapping[str, str]) -> Convert:
    """Return a converter for a name. Names that are not listed stay as they are."""
    return lambda draft, key, name: names.get(name, name)


def _if_on(ours: Any) -> Convert:
    """Return a converter to the given value, if the other tool's option is on."""
    return lambda draft, key, value: ours if value else None


def _listed(names: str | Iterable[Any]) -> list[str]:
    """Return names that are given as a list or as comma-separated text."""
    separate = names.split(",") if isinstance(names, str) else map(str, names)
    return [name.strip() for name in separate if name.strip()]


def _names(draft: Draft, key: str, names: str | Iterable[Any]) -> list[str] | None:
    return _listed(names) or None


def _new_tokens(draft: Draft, key: str, tokens: str | Iterable[Any]) -> list[str] | None:
    return [*draft.values.get("new_tokens", ()), *_listed(tokens)] or None


def _number(draft: Draft, key: str, value: Any) -> Any:
    return float(value) if isinstance(value, str) else value  # YAML 1.1 reads 1e-4 as text


def _limit(draft: Draft, key: str, steps: Any) -> Any:
    return None if steps in (0, -1) else steps  # neither limits anything


def _objective(draft: Draft, key: str, kind: str) -> Objective:
    objective = Objective(_supported(key, kind))
    if kind == "ipo":
        draft.values["preference.loss"] = DpoLoss.IPO
    if objective is Objective.ORPO:
        draft.content["rl_beta"] = draft.take("orpo_alpha", draft.take("rl_beta"))
    if objective is Objective.TEXT and draft.content.get("packing") is None:
        draft.content["packing"] = True  # the default there
    return objective


def _pref_loss(draft: Draft, key: str, loss: str) -> DpoLoss | None:
    if loss == "orpo":
        draft.values["objective"] = Objective.ORPO
    return _supported(key, loss)


def _overrides(draft: Draft, key: str, changed: dict[str, Any]) -> dict[str, Any] | None:
    """Move a scaling of positions to its own key, because it can be imported. Return the base's other changes."""
    scalings = [draft.take("rope_scaling"), *(changed.pop(name, None) for name in ("rope_scaling", "rope_parameters"))]
    draft.content["rope_scaling"] = next(filter(None, scalings), None)
    return changed or None


def _rope_scaling(draft: Draft, key: str, scaling: Any) -> dict[str, Any]:
    given = scaling if isinstance(scaling, dict) else {}  # LLaMA-Factory derives a factor from cutoff_len
    return {"type": given.get("rope_type") or given.get("type") or "", "factor": given.get("factor") or 0}


def _datasets(draft: Draft, key: str, datasets: Any) -> list[str] | None:
    if not isinstance(datasets, list):
        return None
    kinds = {str(dataset.get("type")).partition(":")[0] for dataset in datasets if isinstance(dataset, dict)}
    if kinds == {_COMPLETION}:
        draft.values["objective"] = Objective.TEXT
    if NamedTemplate.ALPACA in kinds:
        draft.content.setdefault("chat_template", NamedTemplate.ALPACA.value)
        draft.changed("datasets.type", _ALPACA_ADDED)
    if len(datasets) == 1 and kinds and (limited := re.fullmatch(r"(.*)\[:(\d+)\]", str(datasets[0].get("split")))):
        draft.values["data.limit"], datasets[0]["split"] = int(limited[2]), limited[1]
    return _dataset_sources(draft, key, datasets)


def _dataset_sources(draft: Draft, key: str, datasets: list[Any]) -> list[str] | None:
    """Return the sources of a list of datasets, and add a note for each of their keys that cannot be imported."""
    sources: list[str] = []
    for number, dataset in enumerate(datasets):
        place = f"{key}[{number}]"
        if not isinstance(dataset, dict) or not isinstance(dataset.get("path"), str):
            raise RecipeError(f"{place} is {dataset!r:.80}", expected="a dataset with a path")
        kind, name, split = dataset.get("type"), dataset.get("name"), str(dataset.get("split") or "train")
        documents = kind == _COMPLETION and draft.objective is not Objective.TEXT
        left_out = {
            "type": (isinstance(kind, dict) or documents) and "rewrite the data in one of the formats of docs/data.md",
            "name": name and f"{name}; give the folder of this configuration instead: hf:ORG/NAME/FOLDER",
            "split": split != "train" and f"{split}; list its files as hf:ORG/NAME/FILE",
        }
        if "[" in split:
            left_out["split"] = f"{split}; data.limit sets the total number of examples"
        for other in sorted(dataset.keys() - _READ_KEYS):
            unusual = dataset[other] not in (None, *_USUAL_COLUMNS.get(other.removeprefix("field_"), ()))
            left_out[other] = unusual and "only the keys in docs/data.md are read; rename the keys of the data"
        for other, reason in left_out.items():
            if reason:
                draft.leave_out(f"{place}.{other}", reason)
        files = dataset.get("data_files") or ()
        files = (files,) if isinstance(files, str) else files
        if dataset["path"] in _LOADERS:
            sources += [each for file in files for each in _sources(file, draft.folder)]
        else:
            sources += _sources(dataset["path"], draft.folder, files, dataset.get("revision"))
    return sources or None


def _named_datasets(draft: Draft, key: str, names: str | list[str]) -> list[str] | None:
    """Return the sources of the datasets in the file that lists them. It is looked up in `dataset_dir`, relative first
    to the working directory, then to the config's folder and each of its parents.
    """
    places = (Path.cwd(), draft.origin, *draft.origin.parents)
    infos = (place / (draft.content.get("dataset_dir") or "data") / _DATASET_INFO for place in places)
    info = next((path for path in infos if path.is_file()), None)
    return [_named_source(draft, name, info) for name in _listed(names)] or None


def _named_source(draft: Draft, name: str, info: Path | None) -> str:
    entry, key = read_json_object(info).get(name) if info else None, f"dataset {name!r}"
    if info is None or not isinstance(entry, dict):
        reason = f"no {_DATASET_INFO} lists this dataset; replace {name}.jsonl with its file or with hf:ORG/NAME"
        draft.leave_out(key, reason)
        return f"./{name}.jsonl"
    columns = (entry.get("columns") or {}).items()
    if unusual := [f"{ours}: {theirs}" for ours, theirs in columns if theirs not in _USUAL_COLUMNS.get(ours, ())]:
        reason = f"the columns {', '.join(unusual)} are not supported; rename them to the keys in docs/data.md"
        draft.leave_out(key, reason)
    for other in ("subset", "split", "num_samples"):
        if entry.get(other) not in (None, "train"):
            draft.leave_out(key, f"{other}: {entry[other]}; list the files as hf:ORG/NAME/FILE")
    if file := entry.get("file_name"):
        return _beside(info.parent / file, draft.folder)
    if hub := entry.get("hf_hub_url"):
        return _sources(hub, draft.folder, filter(None, [entry.get("folder")]))[0]
    draft.leave_out(key, f"the entry has neither file_name nor hf_hub_url; replace {name}.jsonl with its file")
    return f"./{name}.jsonl"


def _sources(path: str, folder: Path, files: Iterable[str] = (), revision: str | None = None) -> list[str]:
    """Return the recipe sources that correspond to a dataset.

    Args:
        path: an existing file or folder, or else the id of a dataset on the Hub.
        folder: folder of the new recipe, to which paths are relative.
        files: files within the dataset; by default, all files.
    """
    local = Path(path).expanduser()
    if local.exists() or path.startswith((".", "/", "~")) or local.suffix:
        return [_beside(local / file, folder) for file in files] or [_beside(local, folder)]
    hub = HUB_PREFIX + path + (f"@{revision}" if revision else "")
    return [f"{hub}/{file}" for file in files] or [hub]


def _beside(path: Path, folder: Path) -> str:
    """Return a path relative to a recipe's folder, or the absolute path if it is outside that folder."""
    absolute = path.absolute()
    return f"./{absolute.relative_to(folder)}" if absolute.is_relative_to(folder) else str(absolute)


def _heldout_share(draft: Draft, key: str, share: float) -> float | None:
    if not share and "data.heldout" not in draft.values:
        draft.changed(key, _NO_HELDOUT)
    return share or None


def _max_samples(draft: Draft, key: str, limit: int) -> int | None:
    datasets = len(draft.values.get("data.train", ()))
    if limit and datasets > 1:
        draft.changed(key, "LLaMA-Factory's limit applies to each dataset; here, it applies to all datasets together")
    return limit * datasets or None


def _method(draft: Draft, key: str, kind: str) -> Method:
    method = Method(_supported(key, kind or "null"))
    dora = draft.take("peft_use_dora", False) or draft.take("use_dora", False)
    bits, quantizer = draft.take("quantization_bit"), draft.take("quantization_method", "bnb")
    four_bit = draft.take("load_in_4bit", False) or method is Method.QLORA or bits == 4
    if bits and bits != 4:
        draft.changed("quantization_bit", _SIXTEEN_BITS)
    elif bits and quantizer not in ("bnb", "bitsandbytes"):
        draft.changed("quantization_method", f"{quantizer} was replaced by bitsandbytes' NF4")
    if method is Method.FULL:
        return method
    if dora and four_bit:
        draft.values |= {"quantization": Quantization.NF4, "adapter.type": AdapterType.DORA}
    return Method.DORA if dora else Method.QLORA if four_bit else Method.LORA


def _accumulation(draft: Draft, key: str, total: int) -> int:
    return max(1, total // draft.values["train.batch_size"])


def _targets(draft: Draft, key: str, names: Any) -> Any:
    if key == "lora_target":  # in Axolotl, text is a pattern
        names = _listed(names)
    if names == ["all"] or draft.content.get("lora_target_linear"):
        return None
    return _PRESETS.get(frozenset(names)) or sorted(set(names)) if isinstance(names, list) else names


def _dropout(draft: Draft, key: str, dropout: float) -> float | None:
    if dropout and draft.objective.is_preference:
        draft.leave_out(key, "dropout would randomly change the likelihoods that are compared")
        return None
    return dropout or None


def _init(draft: Draft, key: str, start: str | bool) -> str | None:
    """Convert PEFT's name for the initialization of an adapter, after `adapter.rslora` was imported."""
    rooted = draft.values.get("adapter.rslora") and start != GAUSSIAN
    if start is False:
        draft.leave_out(key, _RANDOM)
    elif start is not True and (draft.values["method"] != Method.LORA or rooted):
        draft.leave_out(key, f"{start}; adapter.init is available only for `method: lora` without rslora")
    elif start is not True:
        return start
    return None


def _pissa_init(draft: Draft, key: str, on: bool) -> str | None:
    iterations = draft.take("pissa_iter", 16)
    return _init(draft, key, f"pissa_niter_{iterations}" if iterations > 0 else "pissa") if on else None


def _warmup_steps(draft: Draft, key: str, steps: float) -> float | None:
    """Return a number of warmup steps as a ratio. A number below 1 already is one, but LLaMA-Factory ignores 0."""
    if steps < 1:
        return None if steps == 0 and draft.tool is LLAMA_FACTORY else steps
    if total := draft.values.get("train.steps"):
        return round(steps / total, 4)
    draft.values.pop("train.warmup_ratio", None)
    draft.leave_out(key, f"set train.warmup_ratio to {steps} divided by the number of steps")
    return None


def _cutoff_len(draft: Draft, key: str, length: int) -> int:
    if draft.objective.is_preference:
        draft.values["train.too_long"] = TooLong.DROP
        draft.changed(key, "longer pairs are dropped, because the preference does not apply to a truncated answer")
    elif draft.objective is not Objective.TEXT:
        draft.values["train.too_long"] = TooLong.TRUNCATE
    return length


def _gradient_checkpointing(draft: Draft, key: str, value: Any) -> bool:
    if isinstance(value, str):
        draft.changed(key, f"{value!r} was imported as true; activations are not offloaded")
    return bool(value)


def _report_to(draft: Draft, key: str, trackers: str | list[str]) -> list[str] | None:
    known = set(_listed(trackers)) & {tracker.value for tracker in ReportTo}
    return sorted(known | {ReportTo.MLFLOW.value}) if known else None


def _chat_template(draft: Draft, key: str, name: str) -> str | None:
    if name in tuple(NamedTemplate):
        return name
    if name not in ("tokenizer_default", "jinja"):  # `jinja` stands for chat_template_jinja
        draft.changed(key, _REPLACED.format(name))
    return None


def _special_tokens(draft: Draft, key: str, tokens: dict[str, Any]) -> None:
    for name, token in tokens.items():
        if token and name != "pad_token":
            draft.leave_out(f"{key}.{name}", "the base's own tokens are used")


RULES = (
    Rule(("reward_model", "process_reward_model"), convert=_rejected("a reward model")),
    Rule(("pretraining_dataset",), convert=_rejected("a model on raw text")),
    Rule(("processor_type",), convert=_rejected("a model on images or sound")),
    Rule(("diffusion",), convert=_rejected("a diffusion model")),
    Rule(("gptq", "gptq_model_v1"), convert=_rejected("a model that is already quantized")),
    Rule(("rl", "stage"), "objective", _objective),
    Rule(("pref_loss",), "preference.loss", _pref_loss),
    Rule(("rl_beta", "pref_beta"), "preference.beta"),
    Rule(("kto_desirable_weight", "kto_chosen_weight"), "preference.desirable_weight"),
    Rule(("kto_undesirable_weight", "kto_rejected_weight"), "preference.undesirable_weight"),
    Rule(("base_model", "model_name_or_path"), "base"),
    Rule(("overrides_of_model_config",), convert=_overrides, left_out="the base's own config is used"),
    Rule(("rope_scaling",), "rope_scaling", _rope_scaling, left_out=_ROPE),
    Rule(("datasets",), "data.train", _datasets),
    Rule(("dataset",), "data.train", _named_datasets),
    Rule(("test_datasets",), "data.heldout", _dataset_sources),
    Rule(("eval_dataset",), "data.heldout", _named_datasets),
    Rule(("val_set_size", "val_size"), "data.heldout_share", _heldout_share, left_out=_SHARE),
    Rule(("max_samples",), "data.limit", _max_samples),
    Rule(("mask_history",), "data.learn", _if_on(Learn.LAST)),
    Rule(("train_on_inputs", "train_on_prompt"), left_out="only answers are trained on"),
    Rule(("adapter", "finetuning_type"), "method", _method),
    Rule(("load_in_8bit",), changed=_SIXTEEN_BITS),
    Rule(("lora_r", "lora_rank"), "adapter.rank"),
    Rule(("lora_alpha",), "adapter.alpha"),
    Rule(("lora_dropout",), "adapter.dropout", _dropout),
    Rule(("lora_target_modules", "lora_target"), "adapter.targets", _targets, left_out=_PATTERN),
    Rule(("lora_target_linear",), "adapter.targets", _if_on(Targets.ALL_LINEAR)),
    Rule(("peft_use_rslora", "use_rslora"), "adapter.rslora", _if_on(True)),
    Rule(("peft_init_lora_weights",), "adapter.init", _init, left_out=_INIT),
    Rule(("pissa_init",), "adapter.init", _pissa_init, left_out=_INIT),
    Rule(("lora_modules_to_save", "additional_target"), "adapter.modules_to_save", _names, left_out=_WHOLE_LAYERS),
    Rule(("lora_model_dir", "adapter_name_or_path"), left_out=_CONTINUED),
    Rule(("tokens", "add_tokens"), "new_tokens", _new_tokens),
    Rule(("new_special_tokens",), "new_tokens", _new_tokens, changed=_NOT_SPECIAL),
    Rule(("max_steps",), "train.steps", _limit),
    Rule(("num_epochs", "num_train_epochs"), "train.epochs"),
    Rule(("micro_batch_size", "per_device_train_batch_size"), "train.batch_size", changed=_PER_GPU),
    Rule(("batch_size",), "train.gradient_accumulation", _accumulation),
    Rule(("gradient_accumulation_steps",), "train.gradient_accumulation"),
    Rule(("learning_rate",), "train.learning_rate", _number),
    Rule(("loraplus_lr_ratio",), "train.lora_plus_ratio"),
    Rule(("optimizer", "optim"), "train.optimizer", _renamed(_OPTIMIZERS), left_out=_OPTIMIZER),
    Rule(("lr_scheduler", "lr_scheduler_type"), "train.schedule", _renamed(_SCHEDULES), left_out=_SCHEDULE),
    Rule(("warmup_ratio",), "train.warmup_ratio"),
    Rule(("warmup_steps",), "train.warmup_ratio", _warmup_steps),
    Rule(("weight_decay",), "train.weight_decay"),
    Rule(("max_grad_norm",), "train.max_grad_norm"),
    Rule(("neftune_noise_alpha", "noisy_embedding_alpha"), "train.neftune_alpha"),
    Rule(("seed",), "train.seed"),
    Rule(("sequence_len",), "train.max_length"),
    Rule(("cutoff_len",), "train.max_length", _cutoff_len),
    Rule(("excess_length_strategy",), "train.too_long", _renamed({"raise": TooLong.ERROR})),
    Rule(("sample_packing", "packing"), "train.packing"),
    # It implies packing, in which examples attend only to themselves, as always here.
    Rule(("neat_packing",), "train.packing", _if_on(True)),
    Rule(("gradient_checkpointing",), "train.gradient_checkpointing", _gradient_checkpointing),
    Rule(("deepspeed", "fsdp", "fsdp_config", "fsdp_version"), changed=_SEVERAL_GPUS),
    Rule(("save_steps",), "checkpoints.every_steps", _limit, left_out=_STEPS),
    Rule(("save_total_limit",), "checkpoints.keep"),
    Rule(("eval_steps",), "stopping.every_steps", _limit, left_out=_STEPS),
    Rule(("early_stopping_patience", "early_stopping_steps"), "stopping.patience"),
    Rule(("load_best_model_at_end",), "stopping.keep_best", _if_on(True)),
    Rule(("wandb_project",), "report_to", _if_on(["mlflow", "wandb"])),
    Rule(("report_to",), "report_to", _report_to),
    Rule(("chat_template_jinja",), "chat_template", left_out=_TEMPLATE_TEXT),
    Rule(("chat_template",), "chat_template", _chat_template),
    Rule(("template",), changed=_REPLACED),
    Rule(("enable_thinking",), "chat_template_kwargs", _if_on({"enable_thinking": True})),
    Rule(("special_tokens",), convert=_special_tokens),
    Rule(("eot_tokens",), left_out="the template's own end-of-turn token is trained on"),
)
"""Rules for the keys of both tools: the name in Axolotl, then the name in LLaMA-Factory if it differs. The objective,
the data and the method come first, because other keys depend on them."""

NOT_NEEDED = (
    *("bf16", "fp16", "tf32", "float16", "bfloat16", "pure_bf16", "double_quantization", "low_cpu_mem_usage", "debug"),
    *("*attention", "attn_implementation", "flash_attn", "*liger_*", "lora_*_kernel", "use_kernels", "use_unsloth*"),
    *("gradient_checkpointing_kwargs", "use_reentrant_gc", "activation_offloading", "ddp*", "local_rank", "ray_*"),
    *("do_train", "do_eval", "eval_*", "evals_per_epoch", "per_device_eval_batch_size", "save_*", "saves_per_epoch"),
    *("*output_dir", "logging_steps", "plot_loss", "run_name", "resume_from_checkpoint", "auto_resume_*", "plugins"),
    *("dataset_dir", "dataset_prepared_path", "dataset_processes", "tokenized_path", "preprocessing_*", "dataloader_*"),
    *("shuffle_merged_datasets", "group_by_length", "pad_to_sequence_len", "remove_unused_columns", "strict"),
    *("cache_dir", "overwrite_cache", "hub_*", "push_*to_hub", "wandb_*", "mlflow_*", "comet_*", "use_tensorboard"),
    *("model_type", "tokenizer_type", "is_*_derived_model", "trust_remote_code", "resize_vocab", "torchdistx_path"),
    *("loraplus_lr_embedding", "pissa_*", "include_tkps", "include_num_input_tokens_seen", "loss_watchdog_*"),
    *("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model", "image_*", "video_*"),
    *("chat_template_kwargs", "orpo_alpha"),
)
"""Patterns of keys of both tools that the trainer does not need."""


AXOLOTL = Tool(
    "Axolotl",
    {
        "val_set_size": 0,
        "adapter": "null",
        "micro_batch_size": 1,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "sequence_len": 512,
        "excess_length_strategy": "drop",
    },
)
LLAMA_FACTORY = Tool(
    "LLaMA-Factory",
    {
        "val_size": 0,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-5,
        "warmup_ratio": 0,
        "cutoff_len": 2048,
    },
)
TOOLS = {"base_model": AXOLOTL, "model_name_or_path": LLAMA_FACTORY}
"""The tools, by the key that all their configs have."""
