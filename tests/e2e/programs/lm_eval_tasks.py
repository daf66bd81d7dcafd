"""lm-evaluation-harness on rows of one's own: label scores by token ids and echo, and generated answers.

Arguments: base model, folder of its tokenizer, file of BoolQ-like rows, file of results.
"""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

MODEL, TOKENIZER, ROWS, OUT = sys.argv[1:]
TASKS = {
    "labels.yaml": """
task: labels
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{passage}}}}\\nQuestion: {{{{question}}}}?\\nAnswer:"
doc_to_target: answer
doc_to_choice: ["no", "yes"]
metric_list: [{{metric: acc}}]
""",
    "answers.yaml": """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{passage}}}}\\n{{{{question}}}}? Answer yes or no."
doc_to_target: "{{{{'yes' if answer else 'no'}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
""",
}


def evaluate(kind: str, task: str, path: str, tasks: TaskManager, **arguments: object) -> dict:
    import os

    url = f"{os.environ['OPENAI_BASE_URL']}/{path}"
    settings = {"model": MODEL, "base_url": url, "tokenizer_backend": "huggingface", "tokenizer": TOKENIZER}
    return lm_eval.simple_evaluate(
        model=kind,
        model_args={**settings, "num_concurrent": 2, "max_retries": 1},
        tasks=[task],
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
        **arguments,
    )


with tempfile.TemporaryDirectory() as folder:
    for name, text in TASKS.items():
        Path(folder, name).write_text(text.format(rows=ROWS))
    manager = TaskManager(include_path=folder, include_defaults=False)
    labels = evaluate("local-completions", "labels", "completions", manager)
    answers = evaluate(
        "local-chat-completions", "answers", "chat/completions", manager, apply_chat_template=True
    )

chosen = []
for sample in labels["samples"]["labels"]:
    scores = [
        float(pair[0][0]) if isinstance(pair[0], (list, tuple)) else float(pair[0])
        for pair in sample["filtered_resps"]
    ]
    chosen.append(scores)
Path(OUT).write_text(
    json.dumps(
        {
            "label_scores": chosen,
            "accuracy": labels["results"]["labels"]["acc,none"],
            "answers": len(answers["samples"]["answers"]),
        }
    )
)
