"""The part `job`: a whole run on a tiny model, stopped and resumed, on a dense base and on one in 4 bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import BaseQuantization, LoraStage, ReftStage, TrainConfig
from heft_engine.data.rows import Row, parse_row
from heft_engine.data.samples import generate
from heft_engine.errors import Stopped
from heft_engine.events import Event
from heft_engine.gpu_check.part import Findings, Target
from heft_engine.gpu_check.shapes import SMALL
from heft_engine.serving.predictor import load
from heft_engine.training.run import train

_STOP_AT = 5


def check_job(target: Target, findings: Findings) -> None:
    """Trains HEFT with dropout; a run that was stopped and resumed must have the same losses, bit for bit."""
    with tempfile.TemporaryDirectory(prefix="heft-gpu-check-") as name:
        folder = Path(name)
        write_tiny_model(folder / "model")
        quantizations: tuple[BaseQuantization | None, ...] = (None, "nf4")
        for quantization in quantizations:
            findings.figures[quantization or "dense"] = _run(target, folder, quantization, findings)


def _run(
    target: Target, folder: Path, quantization: BaseQuantization | None, findings: Findings
) -> dict[str, object]:
    stages = [
        LoraStage(n_epochs=1, batch_size=8, dropout=0.1),
        ReftStage(n_epochs=1, batch_size=8, dropout=0.1, layers=[1]),
    ]
    config = TrainConfig(
        model=str(folder / "model"),
        method="heft",
        stages=stages,
        base_quantization=quantization,
        max_length=256,
    )
    name = quantization or "dense"
    whole = _losses(config, target, folder / f"{name}-whole", folder / f"{name}-whole-checkpoints")
    checkpoints = folder / f"{name}-checkpoints"
    calls = iter(range(1, 1_000))
    parts: list[tuple[int, float]] = []
    with suppress(Stopped):
        parts += _losses(
            config,
            target,
            folder / f"{name}-stopped",
            checkpoints,
            should_stop=lambda: next(calls) == _STOP_AT,
        )
    newest = max(checkpoints.iterdir(), key=lambda path: path.stat().st_mtime)
    resumed = _losses(config, target, folder / f"{name}-resumed", folder / f"{name}-more", resume=newest)
    same = resumed == whole[len(whole) - len(resumed) :]
    findings.check(same, f"{name}: a resumed run has other losses than an uninterrupted one")
    predictor = load(folder / f"{name}-resumed", device=str(target.device))
    answers = predictor.predict(_rows("test", 8))
    return {
        "steps": len(whole),
        "resumed_with_equal_losses": same,
        "answers": [answer.answer for answer in answers],
    }


def _losses(
    config: TrainConfig,
    target: Target,
    out: Path,
    checkpoints: Path,
    *,
    resume: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[tuple[int, float]]:
    events: list[Event] = []
    options = RunOptions(device=str(target.device), checkpoint_dir=checkpoints, resume=resume)
    train(config, _rows("train", 48), [], out, events.append, options=options, should_stop=should_stop)
    return [(event.data["step"], event.data["loss"]) for event in events if event.code == "METRICS"]


def _rows(split: str, count: int) -> Sequence[Row]:
    return [parse_row(row) for row in generate("passages", split, count)]


def write_tiny_model(path: Path) -> None:
    """Writes a tiny Llama with random weights and a tokenizer, as on the hub."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SMALL.config(), dtype=torch.float32)
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL.vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*topics.values(), *[" yes no"] * 100], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        path
    )
