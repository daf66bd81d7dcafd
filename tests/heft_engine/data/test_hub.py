"""Models and datasets from a hub: pinned, checked before they are downloaded, refused with a helpful message."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub, Repository, fake_hub

CLIENT = Path(__file__).parents[2] / "support" / "hub_client.py"
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with fake_hub() as running:
        yield running


@pytest.fixture(scope="module")
def client(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    home = tmp_path_factory.mktemp("hub-home")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.url,
    }
    process = subprocess.Popen(
        [sys.executable, "-P", CLIENT],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == '"ready"\n'
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=30)


@pytest.fixture
def ask(client: subprocess.Popen[str], hub: FakeHub, tmp_path: Path) -> Ask:
    """Calls into a process whose hub is the fake one, with an empty cache for each test."""

    def call(do: str, reference: str, **options: Any) -> Any:
        assert client.stdin is not None
        assert client.stdout is not None
        order = {"do": do, "reference": reference, "cache_dir": str(tmp_path), **options}
        client.stdin.write(json.dumps(order) + "\n")
        client.stdin.flush()
        return json.loads(client.stdout.readline())

    hub.repositories.clear()
    hub.requests.clear()
    hub.down = False
    return call


def model_files(path: Path, **extra: bytes) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()} | extra


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


# -- models


def test_a_model_is_downloaded_once_and_pinned(hub: FakeHub, ask: Ask, tiny_llama_dir: Path) -> None:
    files = model_files(
        tiny_llama_dir, **{"README.md": b"hi", "consolidated.safetensors": b"twice", "run.py": b"evil"}
    )
    repository = hub.repositories["models", "org/tiny"] = Repository(files=files)
    resolved = ask("resolve", "org/tiny")["ok"]
    assert (resolved["source"], resolved["revision"]) == ("hub", repository.commit)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(
        resolved["files"]
    )
    assert not {"README.md", "consolidated.safetensors", "run.py"} & set(resolved["files"])
    hub.requests.clear()
    assert ask("resolve", f"org/tiny@{repository.commit}")["ok"]["path"] == resolved["path"]
    assert [request for request in hub.requests if "resolve" in request] == []


def test_a_branch_resolves_to_its_commit(hub: FakeHub, ask: Ask, tiny_llama_dir: Path) -> None:
    repository = hub.repositories["models", "org/tiny"] = Repository(files=model_files(tiny_llama_dir))
    assert ask("resolve", "org/tiny@main")["ok"]["revision"] == repository.commit


def test_unknown_models_and_revisions(hub: FakeHub, ask: Ask, tiny_llama_dir: Path) -> None:
    hub.repositories["models", "org/tiny"] = Repository(files=model_files(tiny_llama_dir))
    unknown = ask("resolve", "org/absent")["error"]
    assert unknown["code"] == "model_not_found"
    assert "no model org/absent" in unknown["message"]
    revision = ask("resolve", "org/tiny@v9")["error"]
    assert revision["code"] == "model_not_found"
    assert "no such revision" in revision["message"]


def test_a_gated_model_says_what_to_do(hub: FakeHub, ask: Ask, tiny_llama_dir: Path) -> None:
    hub.repositories["models", "org/tiny"] = Repository(files=model_files(tiny_llama_dir), gated=True)
    error = ask("resolve", "org/tiny")["error"]
    assert error["code"] == "model_access_denied"
    assert "HF_TOKEN" in error["message"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, "supported families"),
        ({"auto_map": {"AutoConfig": "x.Y"}}, "code of its own"),
    ],
)
def test_a_refused_model_costs_no_download_of_weights(
    hub: FakeHub, ask: Ask, tiny_llama_dir: Path, changes: dict[str, Any], words: str
) -> None:
    files = model_files(tiny_llama_dir)
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **changes}).encode()
    hub.repositories["models", "org/odd"] = Repository(files=files)
    error = ask("resolve", "org/odd")["error"]
    assert error["code"] == "unsupported_model"
    assert words in error["message"]
    assert not any("safetensors" in request for request in hub.requests)


def test_a_model_without_safetensors(hub: FakeHub, ask: Ask, tiny_llama_dir: Path) -> None:
    files = model_files(tiny_llama_dir)
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub.repositories["models", "org/pickle"] = Repository(files=files)
    assert "never as a pickle" in ask("resolve", "org/pickle")["error"]["message"]
    assert not any("pytorch_model.bin" in request for request in hub.requests)


def test_a_hub_that_is_down_is_no_missing_model(hub: FakeHub, ask: Ask, tiny_llama_dir: Path) -> None:
    repository = hub.repositories["models", "org/tiny"] = Repository(files=model_files(tiny_llama_dir))
    hub.down = True
    assert ask("resolve", "org/tiny")["error"]["code"] == "hub_unavailable"
    assert ask("rows", "org/rows", file="training_file")["error"]["code"] == "hub_unavailable"
    hub.down = False
    path = ask("resolve", "org/tiny")["ok"]["path"]
    hub.down = True
    assert ask("resolve", "org/tiny")["ok"]["path"] == path
    assert ask("resolve", f"org/tiny@{repository.commit}")["ok"]["path"] == path


# -- datasets


BOOLQ = [
    {"question": "is it so", "answer": True, "passage": "It is."},
    {"question": "is it otherwise", "answer": False, "passage": "It is so."},
]


def test_boolq_as_the_hub_has_it(hub: FakeHub, ask: Ask) -> None:
    files = {
        "data/train-00000-of-00001.parquet": parquet(BOOLQ),
        "data/validation-00000-of-00001.parquet": parquet(BOOLQ[:1]),
    }
    hub.repositories["datasets", "google/boolq"] = Repository(files=files)
    assert ask("rows", "google/boolq", file="training_file")["ok"] == BOOLQ
    assert ask("rows", "google/boolq", file="validation_file")["ok"] == BOOLQ[:1]
    assert ask("rows", "google/boolq:train[1:]", file="validation_file")["ok"] == BOOLQ[1:]


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"id": 7, "question": "q", "answer": "Yes"}, {"question": "q", "answer": "Yes"}),
        ({"question": "2+2", "answer": "It is 4."}, {"prompt": "2+2", "completion": "It is 4."}),
        (
            {"question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
            {"question": "q", "choices": ["x", "y"], "answer": "y"},
        ),
        (
            {"question": "q", "choices": ["x", "y"], "answer": 1},
            {"question": "q", "choices": ["x", "y"], "answer": "y"},
        ),
        (
            {"question": "q", "passage": "p", "choices": ["x", "y"], "answer": "x", "source": "z"},
            {"question": "q", "passage": "p", "choices": ["x", "y"], "answer": "x"},
        ),
        ({"prompt": "p", "completion": "c", "id": 1}, {"prompt": "p", "completion": "c"}),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            {"messages": [{"role": "user", "content": "hi"}]},
        ),
        (
            {
                "messages": [{"role": "user", "content": "hi"}],
                "tools": '[{"function": {"name": "f"}}]',
                "id": 1,
            },
            {"messages": [{"role": "user", "content": "hi"}], "tools": [{"function": {"name": "f"}}]},
        ),
        (
            {
                "messages": [{"role": "user", "content": "hi"}],
                "tools": [{"function": {"name": "f", "x": None}}],
            },
            {"messages": [{"role": "user", "content": "hi"}], "tools": [{"function": {"name": "f"}}]},
        ),
    ],
)
def test_columns_become_rows(hub: FakeHub, ask: Ask, columns: dict[str, Any], row: dict[str, Any]) -> None:
    content = json.dumps(columns).encode() + b"\n"
    hub.repositories["datasets", "org/rows"] = Repository(files={"train.jsonl": content})
    assert ask("rows", "org/rows", file="training_file")["ok"] == [row]


def test_a_configuration_is_named_before_the_split(hub: FakeHub, ask: Ask) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("easy", "hard"))
    card = f"---\nconfigs:\n{configs}---\n".encode()
    files = {
        "README.md": card,
        "easy.jsonl": json.dumps(BOOLQ[0]).encode(),
        "hard.jsonl": json.dumps(BOOLQ[1]).encode(),
    }
    hub.repositories["datasets", "org/two"] = Repository(files=files)
    assert ask("rows", "org/two:hard:train", file="training_file")["ok"] == BOOLQ[1:]
    error = ask("rows", "org/two", file="training_file")["error"]
    assert error["code"] == "dataset_not_found"
    assert "easy" in error["message"]
    assert "hard" in error["message"]


def test_datasets_that_are_known_by_name_need_nothing_else(hub: FakeHub, ask: Ask) -> None:
    """The rows have the layout and the types of the hub."""
    gsm8k = {"question": "2+2?", "answer": "It is 2+2=<<2+2=4>>4.\n#### 4"}
    configs = [("main", "main/train-*"), ("socratic", "socratic/train-*")]
    card = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n"
        for name, path in configs
    )
    hub.repositories["datasets", "openai/gsm8k"] = Repository(
        files={
            "README.md": f"---\nconfigs:\n{card}---\n".encode(),
            "main/train-00000-of-00001.parquet": parquet([gsm8k]),
            "socratic/train-00000-of-00001.parquet": parquet([{**gsm8k, "question": "How much?"}]),
        }
    )
    row = {"prompt": "2+2?", "completion": "It is 2+2=4.\n#### 4"}
    assert ask("rows", "openai/gsm8k", file="training_file")["ok"] == [row]
    assert ask("rows", "openai/gsm8k:socratic", file="training_file")["ok"] == [
        {**row, "prompt": "How much?"}
    ]
    arc = {"id": "x", "question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    hub.repositories["datasets", "allenai/ai2_arc"] = Repository(
        files={
            "README.md": b"---\nconfigs:\n- config_name: ARC-Easy\n  data_files: ARC-Easy/train-*\n---\n",
            "ARC-Easy/train-00000-of-00001.parquet": parquet([arc]),
        }
    )
    chosen = {"question": "q", "choices": ["a", "b"], "answer": "b"}
    assert ask("rows", "allenai/ai2_arc:ARC-Easy", file="training_file")["ok"] == [chosen]
    assert "ARC-Challenge" in ask("rows", "allenai/ai2_arc", file="training_file")["error"]["message"]
    hub.repositories["datasets", "google/boolq"] = Repository(
        files={"train.jsonl": json.dumps(gsm8k).encode()}
    )
    error = ask("rows", "google/boolq", file="training_file")["error"]["message"]
    assert error == "google/boolq must have the columns question, passage, answer; it has question, answer"


def test_faults_of_datasets_are_clear(hub: FakeHub, ask: Ask) -> None:
    odd = json.dumps({"sentence": "x", "label": 1}).encode()
    hub.repositories["datasets", "org/odd"] = Repository(files={"train.jsonl": odd})
    hub.repositories["datasets", "org/gated"] = Repository(files={"train.jsonl": odd}, gated=True)
    columns = ask("rows", "org/odd", file="training_file")["error"]
    assert columns["code"] == "invalid_training_file"
    assert "sentence, label" in columns["message"]
    split = ask("rows", "org/odd:test", file="training_file")["error"]
    assert split["code"] == "dataset_not_found"
    assert "test" in split["message"]
    assert ask("rows", "org/absent", file="training_file")["error"]["code"] == "dataset_not_found"
    assert ask("rows", "org/gated", file="training_file")["error"]["code"] == "dataset_access_denied"
    assert ask("rows", "json", file="training_file")["error"]["code"] == "dataset_not_found"


@pytest.mark.parametrize(
    "data_file", ["{folder}/secret.jsonl", "../../secret.jsonl", "{hub}/elsewhere/secret.jsonl"]
)
def test_a_card_may_not_name_files_elsewhere(hub: FakeHub, ask: Ask, tmp_path: Path, data_file: str) -> None:
    (tmp_path / "secret.jsonl").write_text(json.dumps(BOOLQ[0]))
    data_file = data_file.format(folder=tmp_path, hub=hub.url)
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {data_file}\n---\n".encode()
    hub.repositories["datasets", "org/thief"] = Repository(files={"README.md": card, "train.jsonl": b"{}"})
    assert ask("rows", "org/thief", file="training_file")["error"]["code"] == "dataset_not_found"
    assert not any("elsewhere" in request for request in hub.requests)


def test_scripts_and_odd_files_are_not_run(hub: FakeHub, ask: Ask) -> None:
    hub.repositories["datasets", "org/script"] = Repository(files={"script.py": b"raise SystemExit"})
    hub.repositories["datasets", "org/text"] = Repository(files={"train.txt": b"some text"})
    assert "no longer supported" in ask("rows", "org/script", file="training_file")["error"]["message"]
    assert "are not JSON, CSV or Parquet" in ask("rows", "org/text", file="training_file")["error"]["message"]
