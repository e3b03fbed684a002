"""Imports an Axolotl config (https://docs.axolotl.ai/docs/config-reference.html)."""

from pathlib import Path
from typing import Any

from svc.dataset.schema.objective import Objective
from svc.errors import RecipeError
from trainer.recipe.importers.common_keys import (
    PER_GPU,
    import_dropout,
    import_method,
    import_modules_to_save,
    import_new_tokens,
    import_optimizer,
    import_rope,
    import_run,
    import_schedule,
    import_start,
    import_targets,
    import_warmup,
    source,
)
from trainer.recipe.importers.draft import Draft
from trainer.recipe.named_template import NamedTemplate
from trainer.recipe.preference import DpoLoss
from trainer.recipe.train import TooLong

_NOT_NEEDED = (
    *("bf16", "fp16", "tf32", "float16", "bfloat16", "flash_attention", "attn_implementation", "xformers_attention"),
    *("sdp_attention", "strict", "plugins", "liger_*", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"),
    *("use_kernels", "output_dir", "logging_steps", "save_strategy", "saves_per_epoch", "evals_per_epoch"),
    *("eval_strategy", "eval_batch_size", "eval_sample_packing", "eval_table_size", "eval_max_new_tokens"),
    *("dataset_prepared_path", "dataset_processes", "push_dataset_to_hub", "hub_*", "wandb_*", "mlflow_*", "comet_*"),
    *("model_type", "tokenizer_type", "is_*_derived_model", "pad_to_sequence_len", "resume_from_checkpoint"),
    *(
        "auto_resume_from_checkpoints",
        "gradient_checkpointing_kwargs",
        "local_rank",
        "ddp*",
        "debug",
        "torchdistx_path",
    ),
    *("save_safetensors", "save_only_model", "save_first_step", "loss_watchdog_*", "remove_unused_columns"),
    *("shuffle_merged_datasets", "group_by_length", "low_cpu_mem_usage", "chat_template_kwargs", "include_tkps"),
    *("loraplus_lr_embedding", "use_tensorboard", "activation_offloading", "trust_remote_code"),
)
_OBJECTIVES = {"dpo": Objective.DPO, "ipo": Objective.DPO, "orpo": Objective.ORPO, "kto": Objective.KTO}
_OTHER_TASKS = {
    "reward_model": "a reward model",
    "process_reward_model": "a process reward model",
    "pretraining_dataset": "a model on raw text",
    "processor_type": "a model on images or sound",
    "diffusion": "a diffusion model",
    "gptq": "a model that is already quantized",
    "gptq_model_v1": "a model that is already quantized",
}
_TOO_LONG = {"drop": TooLong.DROP, "truncate": TooLong.TRUNCATE, "raise": TooLong.ERROR}
_ALPACA = "alpaca"
_DATASET_KEYS = {
    "path",
    "type",
    "split",
    "name",
    "data_files",
    "ds_type",
    "revision",
    "trust_remote_code",
    "chat_template",
}
_COMPLETION = "completion"
# Values that the readers of `svc.dataset` find by themselves.
_USUAL_COLUMNS: dict[str, tuple[Any, ...]] = {
    "field_messages": ("messages", "conversations"),
    "field_chosen": ("chosen",),
    "field_rejected": ("rejected",),
    "field_tools": ("tools",),
    "field": ("text",),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"]),
    "train_on_eos": ("turn",),
    "shuffle": (True,),
}


def is_axolotl(content: dict[str, Any]) -> bool:
    """Return whether a YAML file is an Axolotl config."""
    return "base_model" in content


def import_axolotl(draft: Draft, folder: Path) -> None:
    """Import an Axolotl config.

    Args:
        folder: folder of the new recipe.

    Raises:
        RecipeError: the config is not for training a text model on examples or preferences.
    """
    for key, task in _OTHER_TASKS.items():
        if draft.content.get(key):
            raise RecipeError(
                f"the config is for training {task} ({key})",
                expected="a text model that is trained on examples or preferences",
            )
    _import_objective(draft)
    draft.copy("base_model", "base")
    _import_rope(draft)
    _import_data(draft, folder)
    _import_adapter(draft)
    _import_train(draft)
    _import_template(draft)
    draft.finish(_NOT_NEEDED)


def _import_objective(draft: Draft) -> None:
    kind = draft.take("rl")
    if kind is None:
        return
    if kind not in _OBJECTIVES:
        raise RecipeError(f"the config sets `rl: {kind}`", expected=f"one of {', '.join(_OBJECTIVES)}")
    draft.values["objective"] = _OBJECTIVES[kind].value
    if kind == "ipo":
        draft.values["preference.loss"] = DpoLoss.IPO.value
    draft.copy("rl_beta", "preference.beta")
    if _OBJECTIVES[kind] is Objective.ORPO:
        draft.copy("orpo_alpha", "preference.beta")
    if _OBJECTIVES[kind] is Objective.KTO:
        draft.copy("kto_desirable_weight", "preference.desirable_weight")
        draft.copy("kto_undesirable_weight", "preference.undesirable_weight")


def _import_rope(draft: Draft) -> None:
    changed = draft.take("overrides_of_model_config", {})
    nested = [changed.pop(key, None) for key in ("rope_scaling", "rope_parameters")]
    if scaling := draft.take("rope_scaling") or next(filter(None, nested), None):
        kind = scaling.get("rope_type") or scaling.get("type")
        import_rope(draft, "rope_scaling", str(kind), scaling.get("factor"))
    if changed:
        draft.leave_out("overrides_of_model_config", "the base's own config is used")


def _import_data(draft: Draft, folder: Path) -> None:
    datasets = draft.take("datasets", [])
    if not isinstance(datasets, list) or not datasets:
        raise RecipeError("the config names no datasets", expected="a list of `datasets`, each with a path")
    kinds = {str(dataset.get("type")).partition(":")[0] for dataset in datasets if isinstance(dataset, dict)}
    if kinds == {_COMPLETION}:
        draft.values["objective"] = Objective.TEXT.value
    draft.values["data.train"] = [
        each for number, dataset in enumerate(datasets) for each in _sources(draft, "datasets", number, dataset, folder)
    ]
    if _ALPACA in kinds:
        draft.content.setdefault("chat_template", _ALPACA)
        draft.changed(
            "datasets.type",
            "`chat_template: alpaca` was added, because Axolotl's alpaca format puts prompts under Alpaca's headings; "
            "its introduction is the same with and without input; remove the key to use the base's own template",
        )
    _limit(draft, datasets)
    if tests := draft.take("test_datasets"):
        draft.values["data.heldout"] = [
            each
            for number, dataset in enumerate(tests)
            for each in _sources(draft, "test_datasets", number, dataset, folder)
        ]
    share = draft.take("val_set_size", 0)
    if share and share < 1:
        draft.values["data.heldout_share"] = share
    elif share:
        draft.leave_out("val_set_size", f"set data.heldout_share to {share} divided by the number of examples")
    elif not tests:
        draft.changed("val_set_size", "a tenth of the examples is held out, because every version is evaluated")


def _limit(draft: Draft, datasets: list[Any]) -> None:
    """Import a slice such as `train[:1000]` as `data.limit` if the config has only one dataset. All other slices,
    such as percentages, and all splits but `train` are left out with a note.
    """
    for number, dataset in enumerate(datasets):
        split = str(dataset.get("split") or "train") if isinstance(dataset, dict) else "train"
        name, _, first = split.rstrip("]").partition("[:")
        if len(datasets) == 1 and first.isdecimal():
            draft.values["data.limit"], split = int(first), name
        if "[" in split:
            draft.leave_out(f"datasets[{number}].split", f"{split}; data.limit sets the total number of examples")
        elif split != "train":
            draft.leave_out(f"datasets[{number}].split", f"{split}; list its files as hf:ORG/NAME/FILE")


def _sources(draft: Draft, key: str, number: int, dataset: Any, folder: Path) -> list[str]:
    place = f"{key}[{number}]"
    if not isinstance(dataset, dict) or not isinstance(dataset.get("path"), str):
        raise RecipeError(f"{place} is {dataset!r:.80}", expected="a dataset with a path")
    text = draft.values.get("objective") == Objective.TEXT
    if isinstance(dataset.get("type"), dict) or (dataset.get("type") == _COMPLETION and not text):
        draft.leave_out(f"{place}.type", "rewrite the data in one of the formats of docs/data.md")
    if name := dataset.get("name"):
        draft.leave_out(f"{place}.name", f"{name}; give the folder of this configuration instead: hf:ORG/NAME/FOLDER")
    for other in sorted(dataset.keys() - _DATASET_KEYS):
        if dataset[other] not in (None, *_USUAL_COLUMNS.get(other, ())):
            draft.leave_out(f"{place}.{other}", "only the keys in docs/data.md are read; rename the keys of the data")
    files = dataset.get("data_files") or ()
    files = (files,) if isinstance(files, str) else tuple(files)
    if dataset["path"] in ("json", "csv", "parquet", "text"):  # the loaders of Hugging Face's datasets
        return [each for file in files for each in source(file, folder)]
    return source(dataset["path"], folder, files, dataset.get("revision"))


def _import_adapter(draft: Draft) -> None:
    kind = draft.take("adapter")
    if kind not in (None, "", "lora", "qlora"):
        raise RecipeError(f"the config sets `adapter: {kind}`", expected="lora, qlora or no adapter")
    four_bit = bool(draft.take("load_in_4bit")) or kind == "qlora"
    import_method(draft, adapter=bool(kind), dora=bool(draft.take("peft_use_dora")), four_bit=bool(kind) and four_bit)
    if draft.take("load_in_8bit"):
        draft.changed("load_in_8bit", "the frozen weights are in 16 bits; method: qlora stores them in 4 bits")
    names, linear = draft.take("lora_target_modules"), draft.take("lora_target_linear")
    rank, alpha = draft.take("lora_r"), draft.take("lora_alpha")
    import_dropout(draft)
    import_new_tokens(draft, "tokens")
    import_modules_to_save(draft, "lora_modules_to_save")
    if not kind:
        return
    for key, value in (("rank", rank), ("alpha", alpha)):
        if value is not None:
            draft.values[f"adapter.{key}"] = value
    if draft.take("peft_use_rslora"):
        draft.values["adapter.rslora"] = True
    if isinstance(start := draft.take("peft_init_lora_weights"), str):
        import_start(draft, "peft_init_lora_weights", start)
    elif start is False:
        draft.leave_out(
            "peft_init_lora_weights",
            "false would initialize both adapter matrices with random values, which is not available",
        )
    if names and not linear:
        import_targets(draft, "lora_target_modules", names)
    draft.leave_out_if_set("lora_model_dir", "training starts from the base; `base: NAME@N` continues from a version")


def _import_train(draft: Draft) -> None:
    import_run(draft)
    draft.copy("noisy_embedding_alpha", "train.neftune_alpha")
    draft.copy("learning_rate", "train.learning_rate")
    if isinstance(rate := draft.values.get("train.learning_rate"), str):
        draft.values["train.learning_rate"] = float(rate)
    draft.copy("num_epochs", "train.epochs")
    draft.copy("micro_batch_size", "train.batch_size", 1)
    draft.changed("micro_batch_size", PER_GPU)
    total = draft.take("batch_size")
    accumulation = draft.take("gradient_accumulation_steps") or (
        max(1, total // draft.values["train.batch_size"]) if total else 1
    )
    draft.values["train.gradient_accumulation"] = accumulation
    draft.copy("sequence_len", "train.max_length", 512)
    too_long = _TOO_LONG[draft.take("excess_length_strategy", "drop")].value
    if draft.values.get("objective") != Objective.TEXT:  # documents are cut, as Axolotl cuts completions
        draft.values["train.too_long"] = too_long
    draft.copy("sample_packing", "train.packing")
    draft.copy("early_stopping_patience", "stopping.patience")
    import_optimizer(draft, "optimizer", "adamw_torch_fused")
    import_schedule(draft, "lr_scheduler", "cosine")
    import_warmup(draft, 0.03, zero_steps=True)
    draft.leave_out_if_set("train_on_inputs", "only answers are trained on")
    for key in ("fsdp", "fsdp_config", "fsdp_version", "deepspeed"):
        if draft.take(key):
            draft.changed(key, "training on several GPUs is set with train.devices and train.sharding")
    if draft.content.get("wandb_project"):
        draft.values["report_to"] = ["mlflow", "wandb"]


def _import_template(draft: Draft) -> None:
    name, text = draft.take("chat_template"), draft.take("chat_template_jinja")
    if draft.values.get("objective") == Objective.TEXT:
        if name or text:
            draft.changed("chat_template", "documents have no turns, so no chat template is used")
    elif name in tuple(NamedTemplate):
        draft.values["chat_template"] = name
    elif text and str(text).endswith(".jinja"):
        draft.values["chat_template"] = text
    elif text:
        draft.leave_out("chat_template_jinja", "save the template to a file, and set chat_template to ./FILE.jinja")
    elif name and name != "tokenizer_default":
        draft.changed(
            "chat_template", f"{name!r} was replaced by the base's own template; check that both are the same"
        )
    special = {key: value for key, value in (draft.take("special_tokens") or {}).items() if value}
    if other := sorted(special.keys() - {"pad_token"}):
        draft.leave_out(f"special_tokens.{other[0]}", "the base's own tokens are used")
    draft.leave_out_if_set("eot_tokens", "the template's own end-of-turn token is trained on")
