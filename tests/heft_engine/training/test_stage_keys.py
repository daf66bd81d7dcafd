"""Keys of stages: whatever goes into a stage changes its key, and what means the same does not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import LORA, REFT, but, choice, config, parse, yes_no
from tiny_models import save_tiny_model

from heft_engine.config.train import EarlyStopping, TrainConfig
from heft_engine.data.rows import Row
from heft_engine.model.base_models import resolve_path
from heft_engine.training import stage_cache
from heft_engine.training.setup import load as load_inputs

TEST = parse(yes_no(10, seed=2))
OTHER_REFT = but(REFT, layers=[1], rank=3, learning_rate=5e-3)
ROWS = yes_no(12)
VALIDATION = yes_no(6, seed=1)


def keys(
    settings: TrainConfig,
    rows: Sequence[Row] | None = None,
    validation: Sequence[Row] | None = None,
    test: Sequence[Row] = TEST,
) -> list[str]:
    rows = parse(ROWS) if rows is None else rows
    validation = parse(VALIDATION) if validation is None else validation
    base = resolve_path(Path(settings.model))
    return stage_cache.stage_keys(load_inputs(settings, base, rows, validation, test, "cpu"))


def swapped(rows: list[dict[str, Any]]) -> list[Row]:
    return parse([rows[1], rows[0], *rows[2:]])


def reworded(rows: list[dict[str, Any]]) -> list[Row]:
    return parse([{**rows[0], "passage": rows[0]["passage"] + " So"}, *rows[1:]])


def flipped(rows: list[dict[str, Any]]) -> list[Row]:
    return parse([*rows[:-1], {**rows[-1], "answer": not rows[-1]["answer"]}])


def lora(**changes: Any) -> dict[str, Any]:
    return {"stages": [but(LORA, **changes), REFT]}


#: Changed settings, and rows that replace others.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a training row's text": ({}, {"rows": reworded(ROWS)}),
    "a training row's answer": ({}, {"rows": flipped(ROWS)}),
    "the order of training rows": ({}, {"rows": swapped(ROWS)}),
    "one training row less": ({}, {"rows": parse(ROWS[:-1])}),
    "a validation row's text": ({}, {"validation": reworded(VALIDATION)}),
    "a validation row's answer": ({}, {"validation": flipped(VALIDATION)}),
    "no validation rows": ({}, {"validation": []}),
    "a test row's text": ({}, {"test": parse([*yes_no(9, seed=2), yes_no(1, seed=4)[0]])}),
    "a test row's answer": ({}, {"test": flipped(yes_no(10, seed=2))}),
    "validation rows reported in place of test rows": ({}, {"test": []}),
    "seed": ({"seed": 1}, {}),
    "rank": (lora(rank=4), {}),
    "alpha": (lora(alpha=16), {}),
    "epochs": (lora(n_epochs=3), {}),
    "learning rate": (lora(learning_rate=4e-3), {}),
    "batch size": (lora(batch_size=4), {}),
    "scheduler": (lora(scheduler="cosine"), {}),
    "warm-up": (lora(warmup_ratio=0.5), {}),
    "weight decay": (lora(weight_decay=0.1), {}),
    "clipping": (lora(max_grad_norm=0.5), {}),
    "dropout": (lora(dropout=0.1), {}),
    "adapted layers": (lora(layers=[1]), {}),
    "adapted modules": (lora(target_modules=["o_proj"]), {}),
    "dtype": ({"dtype": "bfloat16"}, {}),
    "max_length": ({"max_length": 256}, {}),
    "template": ({"task": {"template": "{passage}\nQ: {question}\nA:"}}, {}),
    "compiled layers": ({"compile": False}, {}),
    "early stopping": ({"early_stopping": EarlyStopping(patience=2)}, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_goes_into_a_stage_makes_another_key(tiny_llama_dir: Path, change: str) -> None:
    settings, rows = CHANGES[change]
    before, changed = keys(config(tiny_llama_dir)), keys(config(tiny_llama_dir, **settings), **rows)
    assert not set(before) & set(changed)


def test_another_base_or_tokenizer_makes_another_key(tiny_llama_dir: Path, tmp_path: Path) -> None:
    mine = keys(config(tiny_llama_dir))
    others = {
        "weights": save_tiny_model(tmp_path / "weights", seed=1),
        "config": shutil.copytree(tiny_llama_dir, tmp_path / "config"),
        "tokenizer": shutil.copytree(tiny_llama_dir, tmp_path / "tokenizer"),
    }
    for path, old, new in (
        (others["config"] / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        (others["tokenizer"] / "chat_template.jinja", "assistant", "Assistant"),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    for path in others.values():
        assert not set(mine) & set(keys(config(path)))


def test_the_same_rows_as_another_split_make_another_key(tiny_llama_dir: Path) -> None:
    """Validation rows that are reported for want of test rows; the record says which they were."""
    settings, rows = config(tiny_llama_dir), parse(VALIDATION)
    assert not set(keys(settings, validation=rows, test=rows)) & set(keys(settings, validation=rows, test=[]))


def test_labels_that_are_only_answered_count_too(tiny_llama_dir: Path) -> None:
    """A row's other choices change its score, but no token that is trained."""
    rows = choice(4)
    with_another_choice = parse([{**rows[0], "choices": [*rows[0]["choices"], "none of it"]}, *rows[1:]])
    settings = config(tiny_llama_dir)
    mine, other = (
        keys(settings, parse(choice(4, seed=1)), [], test) for test in (parse(rows), with_another_choice)
    )
    assert not set(mine) & set(other)


@pytest.mark.parametrize(
    ("attribute", "replacement"),
    [
        ("heft_engine.training.stage_cache.code_hash", lambda: "other code"),
        ("heft_engine.training.stage_cache.package_versions", lambda *_: {"torch": "other"}),
        ("torch.get_float32_matmul_precision", lambda: "medium"),
        ("heft_engine.model.packed_lm.PackedLM.device", torch.device("meta")),
    ],
)
def test_code_libraries_and_where_they_compute_make_another_key(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, attribute: str, replacement: Any
) -> None:
    before = keys(config(tiny_llama_dir))
    monkeypatch.setattr(attribute, replacement)
    assert not set(before) & set(keys(config(tiny_llama_dir)))


def test_the_hash_of_the_code_is_of_every_python_and_cpp_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(stage_cache.__file__).parents[1]
    copy = shutil.copytree(package, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stage_cache, "__file__", str(copy / "training" / "stage_cache.py"))
    hashed = stage_cache.code_hash.__wrapped__
    before = hashed()
    cpp, header = (min((copy / "cpu" / "csrc").glob(f"*.{suffix}")) for suffix in ("cpp", "h"))
    for path in (copy / "training" / "loop.py", copy / "commands" / "train.py", cpp, header):
        path.write_text(path.read_text() + "\n")
        assert hashed() != before
        before = hashed()
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "training.cpython-311.pyc").write_bytes(b"x")
    (copy / "notes.txt").write_text("x")
    assert hashed() == before


def test_kernels_on_and_off_have_different_keys(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels round their sums in another order."""
    monkeypatch.delenv("HEFT_KERNELS", raising=False)
    before = keys(config(tiny_llama_dir))
    monkeypatch.setenv("HEFT_KERNELS", "off")
    assert not set(before) & set(keys(config(tiny_llama_dir)))


def test_what_means_the_same_has_the_same_key(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The first stage's key ignores later stages, the method, "auto" in place of its value, and the base's path."""
    copy = shutil.copytree(tiny_llama_dir, tmp_path / "copy")
    auto = but(LORA, learning_rate="auto")
    mine = keys(config(tiny_llama_dir, stages=[auto, REFT]))
    inputs = load_inputs(config(copy, stages=[auto]), resolve_path(copy), TEST, [], [], "cpu")
    rate = inputs.config.stages[0].learning_rate
    spelt_out = but(LORA, learning_rate=rate, target_modules=["q_proj", "v_proj"])
    other = keys(config(copy, stages=[spelt_out, OTHER_REFT], task={"type": "yes_no"}, max_length=512))
    assert mine[0] == other[0]
    assert mine[1] != other[1]
