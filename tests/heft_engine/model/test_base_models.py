"""Base models are found by name, checked before use, and loaded frozen with classes of a fixed table."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES

from heft_engine.errors import ModelError
from heft_engine.model import smollm2
from heft_engine.model.base_models import available, load_model, load_tokenizer, resolve, resolve_path
from heft_engine.model.model_files import inspect, weights_hash

MakeTinyModel = Callable[[str], Path]


@pytest.fixture
def model_dir(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A model folder with one model, `tiny`, that a test may change."""
    shutil.copytree(tiny_llama_dir, tmp_path / "models" / "tiny")
    return tmp_path / "models"


def change_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_judged_and_loaded_as_transformers_would(
    make_tiny_model: MakeTinyModel, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    base = resolve_path(make_tiny_model(family))
    model = load_model(base, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(base.path).eval()
    info = inspect(base.path)
    assert (info.model_type, info.n_layers, info.hidden_size, info.vocab_size) == (family, 4, 32, 600)
    assert info.max_position_embeddings == 512
    assert info.parameters == sum(parameter.numel() for parameter in reference.parameters())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.arange(40)[None] % 600  # longer than the windows
    assert torch.equal(model(ids).logits, reference(ids).logits)
    config, original = model.config.to_dict(), reference.config.to_dict()
    ignored = {"architectures", "transformers_version", "dtype"}
    assert {name for name in original if config.get(name) != original[name]} <= ignored


def test_bfloat16_and_the_named_attention(tiny_llama_dir: Path) -> None:
    model = load_model(resolve_path(tiny_llama_dir), dtype=torch.bfloat16, attention="eager")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_accelerate_places_the_layers(tiny_llama_dir: Path) -> None:
    base = resolve_path(tiny_llama_dir)
    ids = torch.arange(9)[None]
    placed = load_model(base, dtype=torch.float32, device="auto")
    assert torch.equal(placed(ids).logits, load_model(base, dtype=torch.float32)(ids).logits)


def test_a_tokenizer_comes_with_its_chat_template(tiny_llama_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama_dir)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_directory_of_the_model_folder(model_dir: Path) -> None:
    base = resolve("tiny", model_dir=model_dir)
    assert (base.reference, base.source, base.revision) == ("tiny", "directory", None)
    assert base.path == (model_dir / "tiny").resolve()
    assert "tiny" in available(model_dir)


@pytest.mark.parametrize(
    "reference",
    ["/etc", "./tiny", "../models/tiny", "~/tiny", ".", "..", "", "tiny\0", "a/b/c", "file:///etc", "tiny#x",
     "tiny/..", "a..b", "org/name@", "tiny/", "-x", " tiny", "tiny\n"],
)  # fmt: skip
def test_a_path_is_no_model_name(model_dir: Path, reference: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(reference, model_dir=model_dir)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("model_dir_given", [True, False])
def test_an_unknown_name_says_what_there_is(model_dir: Path, model_dir_given: bool) -> None:
    with pytest.raises(ModelError, match="smollm2-135m") as caught:
        resolve("absent", model_dir=model_dir if model_dir_given else None)
    assert caught.value.code == "model_not_found"


def test_only_hub_ids_have_revisions(model_dir: Path) -> None:
    with pytest.raises(ModelError, match="no revisions"):
        resolve("tiny@main", model_dir=model_dir)


def test_a_link_out_of_the_model_folder_is_refused(model_dir: Path, tiny_llama_dir: Path) -> None:
    (model_dir / "outside").symlink_to(tiny_llama_dir)
    with pytest.raises(ModelError, match="no model 'outside'"):
        resolve("outside", model_dir=model_dir)
    assert "outside" not in available(model_dir)


def test_paths_are_for_the_library_alone(model_dir: Path) -> None:
    path = str(model_dir / "tiny")
    assert resolve(path, allow_paths=True).path == Path(path).resolve()
    with pytest.raises(ModelError, match="no model name"):
        resolve(path, model_dir=model_dir)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "supported families are llama"),
        ({"model_type": None}, "supported families"),
        ({"model_type": ["llama"]}, "supported families"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "never run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"hidden_size": "wide"}, "no valid llama configuration"),
        ({"num_attention_heads": 0}, "no valid llama configuration"),
    ],
)
def test_configs_that_are_refused(model_dir: Path, changes: dict[str, Any], words: str) -> None:
    change_config(model_dir / "tiny", **changes)
    with pytest.raises(ModelError, match=words) as caught:
        resolve("tiny", model_dir=model_dir)
    assert caught.value.code == "unsupported_model"
    assert available(model_dir) == available(None)


def test_fields_that_choose_code_never_reach_transformers(model_dir: Path) -> None:
    """`_attn_implementation` names a kernel that transformers would download and run."""
    change_config(
        model_dir / "tiny",
        _attn_implementation="someone/kernel",
        attn_implementation="someone/kernel",
        _attn_implementation_internal="someone/kernel",
        transformers_weights="../elsewhere.safetensors",
        output_attentions=True,
    )
    config = load_model(resolve("tiny", model_dir=model_dir), dtype=torch.float32).config
    assert config._attn_implementation == "sdpa"
    assert not hasattr(config, "transformers_weights")
    assert not config.output_attentions


def test_a_pickle_is_not_read(model_dir: Path) -> None:
    weights = model_dir / "tiny" / "model.safetensors"
    torch.save(load_file(weights), model_dir / "tiny" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="never as a pickle"):
        resolve("tiny", model_dir=model_dir)


def test_weights_that_are_cut_off(model_dir: Path) -> None:
    weights = model_dir / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="no valid safetensors"):
        resolve("tiny", model_dir=model_dir)


def test_a_missing_tensor_is_not_filled_with_random_numbers(model_dir: Path) -> None:
    weights = model_dir / "tiny" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, model\.layers\.1"):
        load_model(resolve("tiny", model_dir=model_dir), dtype=torch.float32)


def test_a_tensor_of_another_shape(model_dir: Path) -> None:
    change_config(model_dir / "tiny", intermediate_size=128)
    with pytest.raises(ModelError, match="can't be loaded") as caught:
        load_model(resolve("tiny", model_dir=model_dir), dtype=torch.float32)
    assert caught.value.code == "unsupported_model"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 86.00 MiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 86 bytes"),
    ],
)
def test_running_out_of_memory_is_not_the_models_fault(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def from_pretrained(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(RuntimeError, match="allocate"):
        load_model(resolve("tiny", model_dir=model_dir), dtype=torch.float32)


def test_an_adapter_is_no_base_model(model_dir: Path) -> None:
    (model_dir / "tiny" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="name its base model"):
        resolve("tiny", model_dir=model_dir)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "weights.bin", 3])
def test_an_index_may_only_name_files_beside_it(model_dir: Path, name: object) -> None:
    (model_dir / "tiny" / "model.safetensors").unlink()
    (model_dir / "tiny" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ModelError, match="beside it"):
        resolve("tiny", model_dir=model_dir)


def test_sharded_weights(model_dir: Path, tiny_llama_dir: Path) -> None:
    whole = load_model(resolve("tiny", model_dir=model_dir), dtype=torch.float32)
    whole.save_pretrained(model_dir / "sharded", max_shard_size="100KB")
    base = resolve("sharded", model_dir=model_dir)
    assert len(list(base.path.glob("*.safetensors"))) > 1
    assert inspect(base.path).parameters == inspect(tiny_llama_dir).parameters
    again = load_model(base, dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, whole.lm_head.weight)
    next(base.path.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="incomplete"):
        resolve("sharded", model_dir=model_dir)


def test_the_hash_follows_the_weights_alone(model_dir: Path) -> None:
    path = model_dir / "tiny"
    before = weights_hash(path)
    change_config(path, use_cache=False)
    assert weights_hash(path) == before
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert weights_hash(path) != before


def test_a_tokenizer_that_brings_code_is_refused(model_dir: Path) -> None:
    (model_dir / "tiny" / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'
    )
    with pytest.raises(ModelError, match="code of its own"):
        load_tokenizer(model_dir / "tiny")


def test_the_alias_is_converted_once_by_many_starters(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real conversion takes 20 s and 540 MB (see test_smollm2.py); here a copy stands for it."""
    from concurrent.futures import ThreadPoolExecutor

    conversions = []

    def convert(_: Path, out: Path) -> None:
        conversions.append(out)
        shutil.copytree(tiny_llama_dir, out, dirs_exist_ok=True)

    monkeypatch.setattr(smollm2, "_convert", convert)
    leftover = tmp_path / f".{smollm2.ALIAS}-killed.tmp"
    leftover.mkdir()
    with ThreadPoolExecutor(8) as pool:
        bases = list(pool.map(lambda _: resolve("smollm2-135m", cache_dir=tmp_path), range(8)))
    assert len(conversions) == 1
    assert {(base.source, base.revision, base.path) for base in bases} == {
        ("alias", smollm2.version(), tmp_path / f"smollm2-135m-{smollm2.version()}-2")
    }
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path, out: Path) -> None:
        (out / "config.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        resolve("smollm2-135m", cache_dir=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_the_models_command_is_imported_without_torch() -> None:
    """Every training worker runs it when it starts."""
    code = "import sys, heft_engine.commands.models; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "heft_engine.commands.models" in modules.split()
    assert "torch" not in modules.split()
