"""Imports a LLaMA-Factory training config (https://llamafactory.readthedocs.io/en/latest/advanced/arguments.html)."""

from pathlib import Path
from typing import Any

from svc.dataset.schema.objective import Objective
from svc.errors import RecipeError
from svc.files.json_file import read_json_object
from trainer.recipe.data import Learn
from trainer.recipe.importers.common_keys import (
    PER_GPU,
    beside,
    import_dropout,
    import_method,
    import_modules_to_save,
    import_new_tokens,
    import_optimizer,
    import_run,
    import_schedule,
    import_start,
    import_targets,
    import_warmup,
    source,
)
from trainer.recipe.importers.draft import Draft
from trainer.recipe.preference import DpoLoss
from trainer.recipe.recipe import ReportTo
from trainer.recipe.rope import RopeType
from trainer.recipe.train import TooLong

_NOT_NEEDED = (
    *(
        "bf16",
        "fp16",
        "pure_bf16",
        "flash_attn",
        "enable_liger_kernel",
        "use_unsloth",
        "use_unsloth_gc",
        "double_quantization",
    ),
    *("do_train", "do_eval", "output_dir", "overwrite_output_dir", "logging_steps", "plot_loss", "save_only_model"),
    *("save_strategy", "eval_strategy", "per_device_eval_batch_size", "resume_from_checkpoint", "trust_remote_code"),
    *("preprocessing_num_workers", "preprocessing_batch_size", "dataloader_*", "ddp_timeout", "overwrite_cache"),
    *("tokenized_path", "include_num_input_tokens_seen", "run_name", "hub_*", "push_to_hub", "cache_dir", "ray_*"),
    *("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model", "image_*", "video_*"),
    *(
        "pissa_convert",
        "resize_vocab",
        "loraplus_lr_embedding",
        "dataset_dir",
        "use_reentrant_gc",
        "gradient_checkpointing_kwargs",
        "low_cpu_mem_usage",
    ),
)
_OBJECTIVES = {"sft": Objective.SFT, "pt": Objective.TEXT, "dpo": Objective.DPO, "kto": Objective.KTO}
_LOSSES = {"sigmoid": DpoLoss.SIGMOID, "ipo": DpoLoss.IPO}
_DATASET_INFO = "dataset_info.json"
# Columns under the names that the readers of `svc.dataset` find by themselves.
_USUAL_COLUMNS = {
    "prompt": {"instruction", "prompt", "text"},
    "query": {"input"},
    "response": {"output", "completion"},
    "history": {"history"},
    "system": {"system"},
    "tools": {"tools"},
    "messages": {"conversations", "messages"},
    "chosen": {"chosen"},
    "rejected": {"rejected"},
    "kto_tag": {"kto_tag", "label"},
}


def is_llama_factory(content: dict[str, Any]) -> bool:
    """Return whether a YAML file is a LLaMA-Factory training config."""
    return "model_name_or_path" in content


def import_llama_factory(draft: Draft, folder: Path, beginning: Path) -> None:
    """Import a LLaMA-Factory training config.

    Args:
        folder: folder of the new recipe.
        beginning: folder of the config. The dataset list is looked up in `dataset_dir`, relative first to the working
            directory, then to this folder and each of its parents.

    Raises:
        RecipeError: the config is not for training a text model on examples or preferences.
    """
    _import_objective(draft)
    draft.copy("model_name_or_path", "base")
    if kind := draft.take("rope_scaling"):
        # There the factor follows from the base's context and cutoff_len.
        draft.leave_out("rope_scaling", f"{kind}; set rope_scaling with a type ({', '.join(RopeType)}) and a factor")
    _import_data(draft, folder, beginning)
    _import_adapter(draft)
    _import_train(draft)
    if template := draft.take("template"):
        draft.changed("template", f"{template!r} was replaced by the base's own template; check that both are the same")
    if draft.take("enable_thinking"):
        draft.values["chat_template_kwargs"] = {"enable_thinking": True}
    draft.finish(_NOT_NEEDED)


def _import_objective(draft: Draft) -> None:
    stage, loss = draft.take("stage", "sft"), draft.take("pref_loss", "sigmoid")
    if stage not in _OBJECTIVES:
        raise RecipeError(f"the config sets `stage: {stage}`", expected=f"one of {', '.join(_OBJECTIVES)}")
    objective = _OBJECTIVES[stage]
    if objective is Objective.DPO and loss == "orpo":
        objective = Objective.ORPO
    elif objective is Objective.DPO and loss not in _LOSSES:
        raise RecipeError(f"the config sets `pref_loss: {loss}`", expected=f"one of {', '.join(_LOSSES)}, orpo")
    elif objective is Objective.DPO:
        draft.values["preference.loss"] = _LOSSES[loss].value
    draft.values["objective"] = objective.value
    if objective.is_preference:
        draft.copy("pref_beta", "preference.beta")
    if objective is Objective.KTO:
        draft.copy("kto_chosen_weight", "preference.desirable_weight")
        draft.copy("kto_rejected_weight", "preference.undesirable_weight")


def _import_data(draft: Draft, folder: Path, beginning: Path) -> None:
    info = _find_info(draft.content.get("dataset_dir") or "data", beginning)
    trained = _names(draft, "dataset")
    if not trained:
        raise RecipeError("the config names no dataset", expected="dataset names in `dataset`")
    draft.values["data.train"] = [each for name in trained for each in _sources(draft, name, info, folder)]
    if heldout := _names(draft, "eval_dataset"):
        draft.values["data.heldout"] = [each for name in heldout for each in _sources(draft, name, info, folder)]
    share = draft.take("val_size", 0)
    if share and share < 1:
        draft.values["data.heldout_share"] = share
    elif share:
        draft.leave_out("val_size", f"set data.heldout_share to {share} divided by the number of examples")
    elif not heldout:
        draft.changed("val_size", "a tenth of the examples is held out, because every version is evaluated")
    if limit := draft.take("max_samples"):
        draft.values["data.limit"] = limit * len(trained)
        if len(trained) > 1:
            draft.changed(
                "max_samples",
                "in LLaMA-Factory, this limit applies to each dataset; here, it applies to all datasets together",
            )
    if draft.take("mask_history"):
        draft.values["data.learn"] = Learn.LAST.value
    draft.leave_out_if_set("train_on_prompt", "only answers are trained on")


def _names(draft: Draft, key: str) -> list[str]:
    return _listed(draft.take(key, ""))


def _listed(names: str | list[str]) -> list[str]:
    """Return names that are given as a list or as comma-separated text."""
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]


def _find_info(dataset_dir: str, beginning: Path) -> Path | None:
    """Return the path of the file that lists the datasets and their locations, or None if it does not exist."""
    places = (place / dataset_dir / _DATASET_INFO for place in (Path.cwd(), beginning, *beginning.parents))
    return next((place for place in places if place.is_file()), None)


def _sources(draft: Draft, name: str, info: Path | None, folder: Path) -> list[str]:
    entry = read_json_object(info).get(name) if info else None
    key = f"dataset {name!r}"
    if info is None or not isinstance(entry, dict):
        draft.leave_out(
            key,
            f"no {_DATASET_INFO} lists this dataset; replace {name}.jsonl with its file or with hf:ORG/NAME",
        )
        return [f"./{name}.jsonl"]
    columns = entry.get("columns") or {}
    if unusual := [
        f"{ours}: {theirs}" for ours, theirs in columns.items() if theirs not in _USUAL_COLUMNS.get(ours, ())
    ]:
        draft.leave_out(
            key, f"the columns {', '.join(unusual)} are not supported; rename them to the keys in docs/data.md"
        )
    for other in ("subset", "split", "num_samples"):
        if entry.get(other) not in (None, "train"):
            draft.leave_out(key, f"{other}: {entry[other]}; list the files as hf:ORG/NAME/FILE")
    if file := entry.get("file_name"):
        return [beside(info.parent / file, folder)]
    if hub := entry.get("hf_hub_url"):
        inside = entry.get("folder")
        return source(hub, folder, (inside,) if inside else ())
    draft.leave_out(key, f"the entry has neither file_name nor hf_hub_url; replace {name}.jsonl with its file")
    return [f"./{name}.jsonl"]


def _import_adapter(draft: Draft) -> None:
    kind = draft.take("finetuning_type", "lora")
    if kind not in ("lora", "full"):
        raise RecipeError(f"the config sets `finetuning_type: {kind}`", expected="lora or full")
    bits, quantizer = draft.take("quantization_bit"), draft.take("quantization_method", "bnb")
    four_bit = bits == 4
    if bits and not four_bit:
        draft.changed("quantization_bit", "the frozen weights are in 16 bits; method: qlora stores them in 4 bits")
    elif bits and quantizer not in ("bnb", "bitsandbytes"):
        draft.changed("quantization_method", f"{quantizer} was replaced by bitsandbytes' NF4")
    import_method(draft, adapter=kind == "lora", dora=bool(draft.take("use_dora")), four_bit=four_bit)
    rank, alpha = draft.take("lora_rank", 8), draft.take("lora_alpha")
    import_dropout(draft)
    targets, rslora = draft.take("lora_target", "all"), draft.take("use_rslora")
    import_new_tokens(draft, "add_tokens")
    import_new_tokens(draft, "new_special_tokens", special=True)
    import_modules_to_save(draft, "additional_target")
    draft.leave_out_if_set("adapter_name_or_path", "training starts from the base; `base: NAME@N` continues a version")
    if kind == "full":
        return
    draft.values["adapter.rank"] = rank
    for key, value in (("alpha", alpha), ("rslora", rslora)):
        if value:
            draft.values[f"adapter.{key}"] = value
    iterations = draft.take("pissa_iter", 16)
    if draft.take("pissa_init"):
        import_start(draft, "pissa_init", f"pissa_niter_{iterations}" if iterations > 0 else "pissa")
    if targets not in ("all", ["all"]):
        import_targets(draft, "lora_target", _listed(targets))


def _import_train(draft: Draft) -> None:
    import_run(draft)
    draft.copy("learning_rate", "train.learning_rate", 5e-5)
    draft.copy("num_train_epochs", "train.epochs", 3)
    draft.copy("per_device_train_batch_size", "train.batch_size", 8)
    draft.changed("per_device_train_batch_size", PER_GPU)
    draft.copy("gradient_accumulation_steps", "train.gradient_accumulation")
    draft.copy("cutoff_len", "train.max_length", 2048)
    objective = Objective(draft.values["objective"])
    if objective is not Objective.TEXT:  # documents are cut
        draft.values["train.too_long"] = (TooLong.DROP if objective.is_preference else TooLong.TRUNCATE).value
    if objective.is_preference:
        draft.changed(
            "cutoff_len", "longer pairs are dropped, because the preference does not apply to a truncated answer"
        )
    draft.copy("packing", "train.packing", True if objective is Objective.TEXT else None)
    if draft.take("neat_packing"):  # it implies packing, in which examples attend only to themselves, as always here
        draft.values["train.packing"] = True
    draft.copy("early_stopping_steps", "stopping.patience")
    import_optimizer(draft, "optim", "adamw_torch")
    import_schedule(draft, "lr_scheduler_type", "linear")
    import_warmup(draft, 0)
    for key in ("deepspeed", "fsdp", "fsdp_config"):
        if draft.take(key):
            draft.changed(key, "training on several GPUs is set with train.devices and train.sharding")
    reports = draft.take("report_to", "none")
    wanted = [reports] if isinstance(reports, str) else reports
    if trackers := [name for name in wanted if name in tuple(ReportTo)]:
        draft.values["report_to"] = sorted({ReportTo.MLFLOW.value, *trackers})
