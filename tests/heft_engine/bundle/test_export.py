"""A bundle in other tools' formats, each opened by the tool itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from real_pyreft import plain
from safetensors.torch import load_file, save_file
from small_runs import load_inputs, questions, reft, train_inputs, yes_no_rows
from torch import Tensor
from torch.testing import assert_close

from heft_engine.bundle.export import export
from heft_engine.bundle.format import Bundle
from heft_engine.config.train import LoraStage, Stage, recipe
from heft_engine.data.encoding import Example
from heft_engine.errors import BundleError, ConfigError
from heft_engine.model.packing import pack
from heft_engine.serving.predictor import load

MakeTinyModel = Callable[[str], Path]
CLOSE = 1e-4
LORA = LoraStage(n_epochs=2, batch_size=4, learning_rate=1e-2)
REFT = reft(n_epochs=2)


@pytest.fixture(scope="module")
def make_bundle(
    make_tiny_model: MakeTinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bundle]:
    """`make_bundle("llama", stages)`: a float32 run on the family's tiny model, each trained once."""
    bundles: dict[str, Bundle] = {}

    def make(family: str, stages: list[Stage]) -> Bundle:
        key = f"{family} {stages}"
        if key not in bundles:
            inputs = load_inputs(make_tiny_model(family), stages, yes_no_rows())
            bundles[key] = train_inputs(inputs, tmp_path_factory.mktemp("bundles") / "bundle")
        return bundles[key]

    return make


#: Two LoRA stages of different shapes, so that their combination is more than a sum of ranks.
INTERLEAVED: list[Stage] = [
    LORA,
    REFT,
    LoraStage(
        n_epochs=2, batch_size=4, learning_rate=1e-2, rank=3, alpha=5, target_modules=["v_proj", "up_proj"]
    ),
    REFT,
]
#: Two LoRA stages on different layers.
APART: list[Stage] = [
    LORA.model_copy(update={"layers": [0, 2]}),
    LORA.model_copy(update={"layers": [3], "target_modules": ["down_proj"]}),
]
CASES = [
    ("llama", recipe("heft", LORA, REFT)),
    ("llama", INTERLEAVED),
    ("llama", APART),
    ("gpt_neox", recipe("heft_reversed", LORA, REFT)),
    ("gemma2", recipe("heft", LORA, REFT)),
]


def merged_logits(bundle: Bundle, examples: list[Example], scale: float = 0.0) -> Tensor:
    """The bundle's float32 logits at the prompts' last tokens, without its interventions: (examples, vocabulary)."""
    lm = load(bundle.path).lm
    batch = pack([example.supervised() for example in examples], scale=scale)
    with torch.no_grad():
        return lm.logits(lm.hidden(batch)[batch.supervised()[0]])


def plain_logits(model: torch.nn.Module, examples: list[Example]) -> Tensor:
    """Returns the same logits of a transformers model, a row at a time."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([e.prompt])).logits[0, -1] for e in examples])


def prompts(bundle: Bundle) -> list[Example]:
    return questions(load(bundle.path).encoder, yes_no_rows(20))


@pytest.mark.parametrize(("family", "stages"), CASES)
def test_merged_weights_load_in_transformers_with_the_bundles_logits(
    make_bundle: Callable[..., Bundle],
    make_tiny_model: MakeTinyModel,
    tmp_path: Path,
    family: str,
    stages: list[Stage],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bundle = make_bundle(family, stages)
    export(bundle.path, "merged", tmp_path / "merged")
    examples = prompts(bundle)
    expected = merged_logits(bundle, examples)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert model.dtype == torch.float32
    assert model.config._attn_implementation in {"sdpa", "eager"}
    assert_close(plain_logits(model, examples), expected, rtol=0, atol=CLOSE)
    base = plain_logits(plain(make_tiny_model(family)), examples)
    assert (expected - base).abs().max() > 0.1
    row = yes_no_rows(1)[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = f"{row.passage}\nQuestion: {row.question}\nAnswer:"
    assert tokenizer(text)["input_ids"] == list(examples[0].prompt)
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert model.generation_config.eos_token_id == ends, "the second one ends turns in the chat template"


def test_a_merged_directory_is_a_base_model_and_keeps_the_interventions_beside_it(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = make_bundle("llama", CASES[0][1])
    export(bundle.path, "merged", tmp_path / "merged")
    state = load_file(tmp_path / "merged" / "reft" / "intervention.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in bundle.interventions[0].state.items())
    inputs = load_inputs(tmp_path / "merged", [REFT], yes_no_rows())
    examples = prompts(bundle)
    batch = pack([example.supervised() for example in examples])
    with torch.no_grad():
        logits = inputs.lm.logits(inputs.lm.hidden(batch)[batch.supervised()[0]])
    assert torch.equal(logits, merged_logits(bundle, examples))


@pytest.mark.parametrize(("family", "stages"), CASES)
def test_an_adapter_loads_in_peft_on_the_original_base_with_the_bundles_logits(
    make_bundle: Callable[..., Bundle],
    make_tiny_model: MakeTinyModel,
    tmp_path: Path,
    family: str,
    stages: list[Stage],
) -> None:
    bundle = make_bundle(family, stages)
    export(bundle.path, "peft", tmp_path / "adapter")
    examples = prompts(bundle)
    adapted = peft.PeftModel.from_pretrained(plain(make_tiny_model(family)), tmp_path / "adapter").eval()
    assert_close(plain_logits(adapted, examples), merged_logits(bundle, examples), rtol=0, atol=CLOSE)
    assert_close(
        plain_logits(adapted.merge_and_unload(), examples),
        merged_logits(bundle, examples),
        rtol=0,
        atol=CLOSE,
    )


def test_each_adapter_of_a_bundle_loads_in_peft_by_itself(
    make_bundle: Callable[..., Bundle], make_tiny_model: MakeTinyModel
) -> None:
    """Each adapter is loaded onto the base with the earlier ones merged: a bundle stores its stages separately."""
    bundle = make_bundle("llama", INTERLEAVED)
    model = plain(make_tiny_model("llama"))
    for name in ("lora", "lora-2"):
        model = peft.PeftModel.from_pretrained(model, bundle.path / name).merge_and_unload()
    examples = prompts(bundle)
    assert_close(plain_logits(model, examples), merged_logits(bundle, examples), rtol=0, atol=CLOSE)


def test_two_lora_stages_become_one_adapter_of_their_summed_rank(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = make_bundle("llama", INTERLEAVED)
    export(bundle.path, "peft", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (11, 11)
    assert "model.layers.3.mlp.up_proj" in config["target_modules"]
    assert config["base_model_name_or_path"] == bundle.info.base_model.reference


def test_an_adapter_of_the_alias_names_the_model_on_the_hub(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = make_bundle("llama", [LORA])
    copy = shutil.copytree(bundle.path, tmp_path / "bundle")
    reference = json.dumps(bundle.info.base_model.reference)
    manifest = copy / "heft.json"
    manifest.write_text(manifest.read_text().replace(reference, '"smollm2-135m"'))
    export(copy, "peft", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_pyrefts_directory_holds_one_intervention_for_stages_at_one_place(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    """heft_interleaved continues with its first intervention. pyreft loads the directory in test_pyreft_format.py."""
    bundle = make_bundle("llama", INTERLEAVED)
    export(bundle.path, "pyreft", tmp_path / "pyreft")
    (file,) = (tmp_path / "pyreft").glob("intkey_*.bin")
    state = torch.load(file)
    assert state.keys() == {"rotate_layer", "weight", "bias"}
    assert all(torch.equal(state[name], tensor) for name, tensor in bundle.interventions[0].state.items())


@pytest.mark.parametrize(
    ("method", "format", "message"), [("lora", "pyreft", "no ReFT stage"), ("reft", "peft", "no LoRA stage")]
)
def test_a_part_that_a_model_does_not_have_is_not_exported(
    make_bundle: Callable[..., Bundle], tmp_path: Path, method: str, format: str, message: str
) -> None:
    bundle = make_bundle("llama", recipe(method, LORA, REFT))
    with pytest.raises(ConfigError, match=message):
        export(bundle.path, format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_never_writes_among_other_files(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = make_bundle("llama", CASES[0][1])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        export(bundle.path, "peft", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_weights_that_are_not_what_was_trained_are_not_exported(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    """The probe rows are scored before a merged model is exported."""
    bundle = make_bundle("llama", CASES[0][1])
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    adapter = copy / "lora" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(adapter).items()}, adapter)
    with pytest.raises(BundleError, match="probe row"):
        export(copy, "merged", tmp_path / "merged")
