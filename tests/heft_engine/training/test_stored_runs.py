"""Checkpoints and bundles that earlier versions wrote still resume and load.

`stored_runs` was written by commit e7095bb (bundle format 1) with the settings below: a checkpoint inside the second
stage, one at the end of the first, the bundle (its tokenizer, the tiny model's own, left out) and the steps' losses.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from engine_runs import LORA, REFT, but, config, parse, run, yes_no
from tiny_models import save_tokenizer

from heft_engine.bundle.format import read_bundle
from heft_engine.model.model_files import weights_hash
from heft_engine.serving.predictor import load

STORED = Path(__file__).parent / "stored_runs"
VALIDATION = parse(yes_no(8, seed=1))


@pytest.mark.parametrize(("checkpoint", "steps"), [("end-of-a-stage", 3), ("inside-a-stage", 6)])
def test_a_checkpoint_of_an_earlier_version_resumes(
    tiny_llama_dir: Path, tmp_path: Path, checkpoint: str, steps: int
) -> None:
    settings = config(Path("llama"), stages=[but(LORA, rank=2, n_epochs=1), but(REFT, layers=[1])], seed=3)
    record = run(
        settings,
        tmp_path / "out",
        None,
        VALIDATION,
        model_dir=tiny_llama_dir.parent,
        resume=STORED / checkpoint,
    )
    losses = dict(enumerate(json.loads((STORED / "losses.json").read_text()), 1))
    expected = {step: loss for step, loss in losses.items() if step > steps}
    # Another processor may round otherwise.
    assert record.losses == pytest.approx(expected, rel=1e-4)
    assert record.bundle is not None
    stored = read_bundle(STORED / "bundle").info
    assert record.bundle.info.stages == stored.stages
    assert record.bundle.info.evaluation is not None
    assert stored.evaluation is not None
    assert [stage_result["correct"] for stage_result in record.bundle.info.evaluation["results"]] == [
        stage_result["correct"] for stage_result in stored.evaluation["results"]
    ]


def test_a_bundle_of_an_earlier_version_answers_as_it_was_evaluated(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(STORED / "bundle", tmp_path / "bundle")
    save_tokenizer(bundle / "tokenizer")
    # Random weights may differ in their last bits from one machine to another.
    record = json.loads((bundle / "heft.json").read_text())
    record["base_model"]["weights_sha256"] = weights_hash(tiny_llama_dir)
    (bundle / "heft.json").write_text(json.dumps(record))
    predictor = load(bundle, model_dir=tiny_llama_dir.parent, device="cpu")
    answers = predictor.predict(VALIDATION)
    correct = sum(answer.answer == row.answer for answer, row in zip(answers, VALIDATION, strict=True))
    assert correct == record["evaluation"]["results"][-1]["correct"]
