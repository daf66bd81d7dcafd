"""The baselines at their defaults: transformers' Trainer with peft, and pyreft's trainer.

Base, rows, batch size, dtype, rank, learning rate and schedule are HEFT's. pyreft's trainer fails on transformers 4.46
and newer; `_ReftTrainer` fixes its signature.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from heft_engine.config.train import LoraStage, ReftStage
from heft_engine.data.encoding import Example, intervened_positions
from heft_engine.model.base_models import load_tokenizer


def load(path: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Records the seconds of each epoch and the loss of each step."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def result(self) -> dict[str, Any]:
        epochs = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return {"preparing": 0.0, "prefill": 0.0, "epochs": epochs, "losses": self.losses, "cache_bytes": 0}


def train_lora(
    model: Any, path: Path, stage: LoraStage, rows: Sequence[Example]
) -> tuple[Any, dict[str, Any]]:
    """Trains with Trainer + peft. Returns the merged model and the measurement."""
    from peft import LoraConfig, get_peft_model

    assert stage.target_modules != "auto"
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=stage.rank,
        lora_alpha=int(stage.alpha),
        lora_dropout=stage.dropout,
        target_modules=list(stage.target_modules),
    )
    tokenizer = load_tokenizer(path)
    adapted = get_peft_model(model, config)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=adapted,
            args=_arguments(folder, stage),
            train_dataset=[_row(example) for example in rows],
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=-100),
            callbacks=[clock],
        )
        trainer.train()
    return adapted.merge_and_unload(), clock.result()


def train_reft(model: Any, path: Path, stage: ReftStage, rows: Sequence[Example]) -> dict[str, Any]:
    """Trains with pyreft's ReftTrainerForCausalLM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyreft

    class _ReftTrainer(pyreft.ReftTrainerForCausalLM):  # type: ignore[misc]
        def compute_loss(self, intervenable: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return super().compute_loss(intervenable, inputs, return_outputs)

    assert stage.layers != "auto"
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": stage.rank,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=model.config.hidden_size, low_rank_dimension=stage.rank, dtype=model.dtype
            ),
        }
        for layer in stage.layers
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    clock = _Clock()
    data = [
        {**_row(example), "intervention_locations": [intervened_positions(len(example.prompt), 0, 1)]}
        for example in rows
    ]
    tokenizer = load_tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _ReftTrainer(
            model=reft,
            processing_class=tokenizer,
            args=_arguments(folder, stage),
            train_dataset=data,
            data_collator=pyreft.ReftDataCollator(
                data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=-100)
            ),
            callbacks=[clock],
        )
        trainer.train()
    return clock.result()


def _row(example: Example) -> dict[str, Any]:
    answer = list(example.answers[0])
    ids = [*example.prompt, *answer]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [-100] * len(example.prompt) + answer,
    }


def _arguments(folder: str, stage: LoraStage | ReftStage) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=stage.batch_size,
        num_train_epochs=stage.n_epochs,
        learning_rate=float(stage.learning_rate),
        warmup_steps=stage.warmup_ratio,  # below 1: a share of all steps
        lr_scheduler_type=stage.scheduler,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=0,
    )
