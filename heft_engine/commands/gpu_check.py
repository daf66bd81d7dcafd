"""`gpu-check`: runs a HEFT job on a random model of Llama-2-7B's shape, on a GPU, and prints memory, speed and parity.

The job is an ordinary one (`heft_engine.training.run.train`); only the model is random, so no weights are downloaded.
Where memory is short the model has fewer layers. Tests run the same path with a tiny shape on a CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from heft_engine.bundle.format import read_bundle
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import LoraStage, ReftStage, TrainConfig
from heft_engine.data.rows import Row, parse_row
from heft_engine.data.samples import generate
from heft_engine.errors import TrainingError
from heft_engine.events import Event
from heft_engine.inference.scoring import score
from heft_engine.serving.predictor import load
from heft_engine.training.run import train

TRAIN_ROWS, TEST_ROWS = 64, 32
#: Of the device's free memory, for weights: the rest is for activations and the cache.
WEIGHTS_SHARE = 0.6


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4_096,
            bos_token_id=0,
            eos_token_id=1,
        )

    def parameters(self) -> int:
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


LLAMA_2_7B = Shape(layers=32, hidden=4_096, intermediate=11_008, heads=32, vocabulary=32_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    """Runs the check on the first GPU, if there is one. Raises EngineError."""
    if not torch.cuda.is_available():
        print("torch finds no GPU on this machine: there is nothing to check")
        return
    check(LLAMA_2_7B, "cuda")


def check(full: Shape, device: str) -> None:
    """Trains, serves and compares on `device`, and prints figures. Raises EngineError when a check fails."""
    with tempfile.TemporaryDirectory(prefix="heft-gpu-check-") as folder:
        shape = fitting(full, device, Path(folder))
        _print_shape(shape, full, device)
        write_model(shape, Path(folder) / "model")
        _train(Path(folder), device)
        _serve(Path(folder), device)
    print("all checks passed")


def fitting(full: Shape, device: str, folder: Path) -> Shape:
    """Returns the shape with as many layers as fit.

    Weights are bfloat16 on the device and on the disk. Raises TrainingError (out_of_memory) where fewer than two layers
    fit.
    """
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    parameters = [free * WEIGHTS_SHARE / 2, shutil.disk_usage(folder).free / 2]
    for layers in range(full.layers, 1, -1):
        shape = replace(full, layers=layers)
        if shape.parameters() <= min(parameters):
            return shape
    raise TrainingError("not even two layers of this shape fit into this machine", code="out_of_memory")


def write_model(shape: Shape, path: Path) -> None:
    """Writes a model directory as on the hub: bfloat16 shards, one for each layer, so that little memory is needed."""
    path.mkdir()
    config = shape.config()
    config.save_pretrained(path)
    with torch.device("meta"):
        meta = LlamaForCausalLM(config).state_dict()
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, (_, names) in enumerate(groupby(meta, key=lambda name: name.split(".")[:3])):
        shard = {name: _random(meta[name], generator) for name in names}
        file = f"model-{number:05d}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _tokenizer(shape.vocabulary).save_pretrained(path)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    return (torch.randn(like.shape, generator=generator) * 0.02).to(torch.bfloat16)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*topics.values(), *[" yes no"] * 100], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _print_shape(shape: Shape, full: Shape, device: str) -> None:
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    fewer = f" (of {full.layers}: more don't fit)" if shape != full else ""
    print(
        f"{name}, torch {torch.__version__}: {shape.parameters():,} parameters, {shape.layers} layers{fewer}"
    )


def _rows(split: str, n: int) -> list[Row]:
    return [parse_row(row) for row in generate("passages", split, n)]


def _train(folder: Path, device: str) -> None:
    stages = [LoraStage(n_epochs=1, batch_size=8), ReftStage(n_epochs=1, batch_size=8)]
    config = TrainConfig(model=str(folder / "model"), method="heft", stages=stages, max_length=512)
    test = _rows("test", TEST_ROWS)
    _reset_peak(device)
    train(
        config,
        _rows("train", TRAIN_ROWS),
        [],
        folder / "bundle",
        _print_event,
        test_rows=test,
        options=RunOptions(device=device),
    )
    _print_memory("training", device)


def _print_event(event: Event) -> None:
    data = event.data
    if event.code == "MERGE_VERIFIED":
        print(
            f"merge: float32 {data['float32']:.1e} (limit {data['limit']:g}), {data['dtype']} "
            f"{data['served_dtype']:.1e} beside its own noise of {data['dtype_noise']:.1e}"
        )
    elif event.code == "METRICS" and data["step"] % (TRAIN_ROWS // 8) == 0:
        print(f"{data['stage']}: {data['tokens'] / data['seconds']:,.0f} tokens/s, loss {data['loss']:.3f}")
    elif event.code in ("EVALUATION", "WARNING"):
        print(event.message)


def _serve(folder: Path, device: str) -> None:
    """Loads the bundle, which checks its probe rows, and compares scores of rows alone and together."""
    _reset_peak(device)
    predictor = load(folder / "bundle", device=device)
    examples = [predictor.encoder.question(row) for row in _rows("test", TEST_ROWS)]
    together = [scores.totals for scores in score(predictor.lm, examples)]
    alone = [score(predictor.lm, [example])[0].totals for example in examples]
    pairs = list(zip(together, alone, strict=True))
    same = sum(first == second for first, second in pairs)
    difference = max(abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True))
    print(
        f"serving: {same} of {len(examples)} scores have the same bits alone and together; "
        f"they differ by at most {difference:.1e}"
    )
    _print_memory("serving", device)
    if difference > read_bundle(folder / "bundle").info.probe_tolerance:
        raise TrainingError("a row's score depends on the other rows of its batch", code="parity_broken")


def _reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def _print_memory(what: str, device: str) -> None:
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else psutil.Process().memory_info().rss
    print(f"{what}: {peak / 2**30:.2f} GiB {'at most' if device != 'cpu' else 'now'}")
