"""A bundle on disk: it loads and answers, and a changed one is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import LORA, REFT, but, config, parse, run, text, yes_no
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from torch import Tensor

from heft_engine.bundle.format import added_interventions, read_bundle
from heft_engine.data.rows import parse_row
from heft_engine.errors import BundleError, ModelError, RowError
from heft_engine.inference.greedy import generate
from heft_engine.serving.predictor import Predictor, load, load_base

ROWS = parse(yes_no(12, seed=5))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and a bundle `out` of a HEFT run; to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("bundle")
    save_tiny_model(folder / "base")
    stages = [but(LORA, n_epochs=1), but(REFT, n_epochs=1)]
    run(config(folder / "base", "heft", stages), folder / "out")
    return folder


@pytest.fixture
def bundle(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained / "out", tmp_path / "bundle")


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    return load(trained / "out", device="cpu")


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(file)), file)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# -- answers


def test_switched_off_or_scaled_to_nought_it_is_the_merged_model(bundle: Path, predictor: Predictor) -> None:
    shutil.rmtree(bundle / "reft")
    stages = json.loads((bundle / "heft.json").read_text())["stages"]
    edit_json(bundle / "heft.json", stages=stages[:1], probe_tolerance=100.0)
    merged = load(bundle, device="cpu").predict(ROWS)
    on = predictor.predict(ROWS)
    assert predictor.predict(ROWS, enabled=False) == merged
    assert predictor.predict(ROWS, scale=0.0) == merged
    assert predictor.predict(ROWS, enabled=False, scale=3.0) == merged
    assert predictor.predict(ROWS, scale=1.0) == on
    half = predictor.predict(ROWS, scale=0.5)
    assert len({tuple(answer.probability for answer in answers) for answers in (merged, half, on)}) == 3


def test_an_answer_is_the_likeliest_label(predictor: Predictor) -> None:
    for row, answer in zip(ROWS, predictor.predict(ROWS), strict=True):
        assert answer.label_probabilities is not None
        assert set(answer.label_probabilities) == {"yes", "no"}
        assert (
            answer.label_probabilities[answer.answer]
            == answer.probability
            == max(answer.label_probabilities.values())
        )
        assert answer.prompt_tokens == len(predictor.encoder.question(row).prompt)
        assert answer.completion_tokens == 0


def test_a_row_of_another_task_is_refused(predictor: Predictor) -> None:
    with pytest.raises(RowError, match="the task is yes_no"):
        predictor.predict([*ROWS, parse_row({"prompt": "a", "completion": "b"})])


def test_threads_that_ask_at_once_get_what_one_gets(predictor: Predictor) -> None:
    alone = predictor.predict(ROWS)
    together = threading.Barrier(4)

    def ask(_: int) -> Any:
        together.wait()
        return [predictor.predict([row])[0] for row in ROWS], predictor.predict(ROWS, enabled=False)

    off = predictor.predict(ROWS, enabled=False)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    for rows_alone, rows_off in answers:
        for answer, expected in zip([*rows_alone, *rows_off], [*alone, *off], strict=True):
            assert answer.answer == expected.answer
            assert answer.probability == pytest.approx(expected.probability, abs=1e-5)


def test_memory_counts_every_parameter_once(predictor: Predictor) -> None:
    model = sum(p.numel() for p in predictor.lm.model.parameters())
    assert predictor.memory_bytes == 4 * (model + 32 * 2 + 32 * 2 + 2)


def test_text_is_written_up_to_eos_or_as_far_as_it_may_go(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = parse(text(8))
    run(config(tiny_llama_dir, "heft"), tmp_path / "out", rows)
    questions = [parse_row({"prompt": rows[0].prompt}, need_answer=False)]
    predictor = load(tmp_path / "out", device="cpu")
    encoder = predictor.encoder
    assert predictor.max_new_tokens == 64
    (answer,) = predictor.predict(questions)
    (tokens,) = generate(predictor.lm, [encoder.question(questions[0])], eos_tokens={-1}, max_new_tokens=[64])
    assert answer.answer == encoder.tokenizer.decode(tokens)
    assert answer.completion_tokens == 64
    assert (answer.probability, answer.label_probabilities) == (None, None)
    encoder.max_length = answer.prompt_tokens + 3
    assert predictor.predict(questions)[0].completion_tokens == 3
    encoder.tokenizer.eos_token = encoder.tokenizer.convert_ids_to_tokens(tokens[2])
    (shorter,) = predictor.predict(questions)
    assert shorter.completion_tokens == tokens.index(tokens[2])
    assert shorter.answer == encoder.tokenizer.decode(tokens[: tokens.index(tokens[2])])


def test_a_base_answers_with_the_tasks_default_template(tiny_llama_dir: Path) -> None:
    base = load_base(str(tiny_llama_dir), task="yes_no", device="cpu")
    prompt = base.encoder.tokenizer.decode(base.encoder.question(ROWS[0]).prompt)
    assert prompt == f"{ROWS[0].passage}\nQuestion: {ROWS[0].question}?\nAnswer:"
    assert {answer.answer for answer in base.predict(ROWS)} <= {"yes", "no"}


# -- refusals


def refused(bundle: Path, match: str) -> None:
    with pytest.raises(BundleError, match=match):
        load(bundle, device="cpu")


def test_another_base_is_refused(trained: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", seed=1)
    bundle = shutil.copytree(trained / "out", tmp_path / "bundle")
    info = json.loads((bundle / "heft.json").read_text())
    edit_json(bundle / "heft.json", base_model=info["base_model"] | {"reference": str(tmp_path / "base")})
    refused(bundle, "its weights differ")


def test_a_base_whose_weights_were_replaced_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    run(config(tmp_path / "base", "reft", [but(REFT, n_epochs=1)]), tmp_path / "out")
    load(tmp_path / "out", device="cpu")
    shutil.rmtree(tmp_path / "base")
    save_tiny_model(tmp_path / "base", seed=1)
    refused(tmp_path / "out", "is not the base this model was trained on")


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_changed_intervention_fails_the_probe(bundle: Path, name: str) -> None:
    edit_tensors(bundle / "reft" / "intervention.safetensors", lambda t: t | {name: t[name] + 0.5})
    refused(bundle, r"probe row \d scores .* away from what training saw .* not the model that was trained")


def test_a_changed_adapter_fails_the_probe(bundle: Path) -> None:
    def louder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: 2 * t if "lora_B" in name else t for name, t in tensors.items()}

    edit_tensors(bundle / "lora" / "adapter_model.safetensors", louder)
    refused(bundle, "not the model that was trained")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layer": 1}, "not the model that was trained"),
        ({"layer": 4}, "has 4 layers"),
        ({"layer": -1}, "has 4 layers"),
        ({"rank": 3}, "is not for hidden size 32"),
        ({"positions": "f1"}, "not the model that was trained"),
        ({"positions": "middle"}, "can't be read: positions must have the form"),
        ({"kind": "os.system"}, "'os.system' are not known"),
        ({"kind": "direft"}, "not the model that was trained"),
        ({"kind": "noreft"}, "has no proj_layer"),
    ],
)
def test_a_changed_place_is_refused(bundle: Path, changes: dict[str, Any], match: str) -> None:
    edit_json(bundle / "reft" / "intervention.json", **changes)
    refused(bundle, match)


def test_a_rotation_that_is_none_is_refused(bundle: Path) -> None:
    edit_tensors(
        bundle / "reft" / "intervention.safetensors", lambda t: t | {"rotate_layer": 1.01 * t["rotate_layer"]}
    )
    refused(bundle, "layer 2 is damaged: the intervention's rotation R collapsed")


def test_another_tokenizer_is_refused(bundle: Path) -> None:
    file = bundle / "tokenizer" / "tokenizer_config.json"
    edit_json(file, eos_token="<|im_end|>")
    refused(bundle, "tokenizer is not the one its model was trained with")


def test_a_cut_tokenizer_is_refused(bundle: Path) -> None:
    file = bundle / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ModelError, match="the tokenizer of tokenizer can't be read"):
        load(bundle, device="cpu")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": 2}, "has format 2; this version reads format 1"),
        ({"extra": 1}, "is no bundle"),
        ({"seed": "x"}, "is no"),
    ],
)
def test_another_format_is_refused(bundle: Path, changes: dict[str, Any], match: str) -> None:
    edit_json(bundle / "heft.json", **changes)
    refused(bundle, match)


@pytest.mark.parametrize(
    ("missing", "match"),
    [
        ("heft.json", "is no bundle"),
        ("lora", "should hold 1 adapters and 1 interventions; it has 0 and 1"),
        ("reft", "it has 1 and 0"),
        ("probe.safetensors", "probe rows can't be read"),
        ("reft/intervention.safetensors", "reft can't be read"),
        ("lora/adapter_config.json", "lora can't be read"),
    ],
)
def test_a_bundle_with_a_part_missing_is_refused(bundle: Path, missing: str, match: str) -> None:
    path = bundle / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(bundle, match)


@pytest.mark.parametrize(
    "name", ["probe.safetensors", "reft/intervention.safetensors", "lora/adapter_model.safetensors"]
)
def test_a_cut_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes((bundle / name).read_bytes()[:-20])
    refused(bundle, "can't be read")


def test_the_probe_holds_scores_of_training_prompts(trained: Path, predictor: Predictor) -> None:
    probe = read_bundle(trained / "out").probe
    assert len(probe.examples) == len(probe.scores) == 8
    training = {predictor.encoder.question(row).prompt for row in parse(yes_no(24))}
    assert {example.prompt for example in probe.examples} <= training
    assert torch.tensor(probe.scores).isfinite().all()


def test_each_stage_adds_the_interventions_that_no_earlier_one_has() -> None:
    """A stage with `init: "new"` adds all; older bundles have no kind, which is loreft."""
    reft = {"type": "reft", "layers": [1, 2], "positions": "l1", "rank": 4}
    stages = [
        {"type": "lora"},
        reft,
        {**reft, "kind": "loreft", "layers": [2, 3]},
        {**reft, "kind": "direft", "layers": [2]},
        {**reft, "kind": "loreft", "init": "new"},
        {**reft, "kind": "loreft", "layers": [3]},
    ]
    assert added_interventions(stages) == [[], [1, 2], [3], [2], [1, 2], []]
