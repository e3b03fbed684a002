"""Trains a job of benchmarks.training_speed with Unsloth.

    python -I benchmarks/unsloth_training.py JOB.json RESULT.json

Unsloth changes transformers when it is imported, and needs older releases of it than this project. It therefore runs in
a separate process, possibly with another interpreter, and this file imports nothing from the project.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train an adapter on rows of token ids, in their order.

    Args:
        job: written by benchmarks.training_speed.

    Returns:
        `seconds` from the first step to the end of the last, `losses` of each step in nats per answer token, and
        `peak_memory` of the GPU in bytes.
    """
    from unsloth import FastLanguageModel  # type: ignore[import-not-found] # isort: skip # before what it changes

    import torch
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    dtype = getattr(torch, job["number_type"])
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=job["base"], max_seq_length=job["max_length"], dtype=dtype, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=job["dropout"],
        target_modules=job["targets"],
        bias="none",
        use_gradient_checkpointing=job["checkpointing"],
        random_state=job["seed"],
        use_rslora=job["rslora"],
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=job["learning_rate"],
            lr_scheduler_type=job["schedule"],
            warmup_steps=job["warmup_steps"],
            num_train_epochs=1,
            per_device_train_batch_size=job["batch_size"],
            seed=job["seed"],
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = job["rows"]
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)
        )
        trainer._get_train_sampler = lambda *_: SequentialSampler(rows)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "losses": losses, "peak_memory": torch.cuda.max_memory_allocated()}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(train(json.loads(Path(sys.argv[1]).read_text("utf-8")))), "utf-8")
