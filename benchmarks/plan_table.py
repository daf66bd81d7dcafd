"""The table of models and cards in docs/gpu.md: what fits, planned from configurations alone.

python -m benchmarks.plan_table
"""

from __future__ import annotations

from itertools import product
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from heft_engine.config.train import BaseQuantization, TrainConfig, recipe
from heft_engine.training.dry_run import Machine, Rows, plan_run

GB = 10**9
#: BoolQ as the paper has it: rows of about 160 tokens, the longest about four times as long.
BOOLQ = Rows(count=9_427, tokens=160, longest=640)
HOST_BYTES = 64 * GB
CARDS = (16, 24, 48, 80)


def _llama(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(**{"max_position_embeddings": 4_096, "num_key_value_heads": 8, **sizes})


MODELS: dict[str, PreTrainedConfig] = {
    "Llama-2-7B": _llama(
        hidden_size=4_096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32_000,
    ),
    "Llama-3-8B": _llama(
        hidden_size=4_096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=128_256,
    ),
    "Qwen2.5-14B": Qwen2Config(
        hidden_size=5_120,
        intermediate_size=13_824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152_064,
    ),
    "Qwen2.5-32B": Qwen2Config(
        hidden_size=5_120,
        intermediate_size=27_648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152_064,
    ),
    "Llama-3-70B": _llama(
        hidden_size=8_192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        vocab_size=128_256,
    ),
}


def main() -> None:
    header = ["model", "weights", *(f"{card} GB" for card in CARDS)]
    print(_line(header))
    print(_line(["---"] * len(header)))
    quantizations: tuple[BaseQuantization | None, ...] = (None, "nf4")
    for (name, model), quantization in product(MODELS.items(), quantizations):
        config = TrainConfig(model="-", stages=recipe("heft"), base_quantization=quantization)
        cells = [_cell(config, model, card * GB) for card in CARDS]
        print(_line([name, quantization or "bfloat16", *cells]), flush=True)


def _cell(config: TrainConfig, model: PreTrainedConfig, gpu_bytes: int) -> str:
    """Returns the peak on one card where the run fits it, else on each of eight, else a dash."""
    for gpus in (1, 8):
        stages = plan_run(
            config, model, BOOLQ, Machine(gpu_bytes=gpu_bytes, gpus=gpus, host_bytes=HOST_BYTES)
        )
        if all(stage.fits for stage in stages):
            peak = f"{max(stage.gpu_bytes or 0 for stage in stages) / GB:.0f} GB"
            notes = ["on each of 8"] if gpus > 1 else []
            notes += ["checkpointed"] if any(stage.checkpointing for stage in stages) else []
            return peak + (f" ({', '.join(notes)})" if notes else "")
    return "–"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
