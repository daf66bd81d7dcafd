"""Programs that were written for OpenAI's API run unmodified against the whole service: `make test-clients`.

Each is a process of an environment of its own, with the service's address and key in OpenAI's variables.
CLIENTS_PYTHON: the Python of that environment. CLIENTS_NODE: a folder with node_modules of openai.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_stack import HeftUp, heft_up
from tiny_models import save_chat_model

from cli.stack.home import Home
from heft_engine.data.samples import generate

PROGRAMS = Path(__file__).parent / "programs"
#: The second one has tools; it is tiny and random.
MODEL, TOOLS_MODEL = "smollm2-135m", "tiny-tools"

Run = Callable[..., None]


@pytest.fixture(scope="module")
def service() -> Iterator[HeftUp]:
    """`heft up` with SmolLM2, and a tiny random model whose chat template has tools."""
    folder = Path(tempfile.mkdtemp(prefix="heft-clients-", dir="/tmp"))
    folder.chmod(0o711)
    save_chat_model(folder / "models" / TOOLS_MODEL, "qwen2")
    try:
        with heft_up(Home.at(folder / "home"), HEFT_MODEL_DIR=str(folder / "models")) as service:
            yield service
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def run(service: HeftUp) -> Callable[..., None]:
    """`run(*command)` runs a program with the service's address and key; its output is shown if it fails."""

    def run(*command: str | Path) -> None:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("HEFT_", "PYTHON"))
        }
        environment = inherited | {
            "OPENAI_BASE_URL": f"{service.record.url}/v1",
            "OPENAI_API_KEY": service.key,
            "HF_HUB_OFFLINE": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        completed = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert completed.returncode == 0, completed.stdout[-3_000:] + completed.stderr[-6_000:]

    return run


@pytest.mark.parametrize("program", ["langchain_chat", "litellm_library", "litellm_proxy"])
def test_a_python_program(run: Run, program: str) -> None:
    run(os.environ["CLIENTS_PYTHON"], PROGRAMS / f"{program}.py", MODEL, TOOLS_MODEL)


def test_the_openai_package_of_npm(run: Run) -> None:
    folder = Path(os.environ["CLIENTS_NODE"])
    program = shutil.copy(PROGRAMS / "openai_node.mjs", folder)
    run("node", program, MODEL, TOOLS_MODEL)


def test_lm_evaluation_harness_scores_labels_as_the_service_does(
    service: HeftUp, run: Run, tmp_path: Path
) -> None:
    rows = list(itertools.islice(generate("passages", "test"), 24))
    data, out = tmp_path / "rows.jsonl", tmp_path / "results.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tokenizer,) = service.home.path.rglob("tokenizer.json")
    run(
        service,
        os.environ["CLIENTS_PYTHON"],
        PROGRAMS / "lm_eval_tasks.py",
        MODEL,
        tokenizer.parent,
        data,
        out,
    )
    results = json.loads(out.read_text())
    assert results["answers"] == len(rows)
    by_harness = [scores.index(max(scores)) for scores in results["label_scores"]]
    assert by_harness == [int(answer["answer"] == "yes") for answer in asked(service, rows)]


def asked(service: HeftUp, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The service's own answers to the rows."""
    inputs = [{name: row[name] for name in ("question", "passage")} for row in rows]
    answer = httpx.post(
        f"{service.record.url}/predict",
        json={"model": MODEL, "inputs": inputs},
        headers={"Authorization": f"Bearer {service.key}"},
        timeout=120,
    )
    predictions: list[dict[str, Any]] = answer.raise_for_status().json()["data"]
    return predictions
