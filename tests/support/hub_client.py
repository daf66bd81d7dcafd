"""A process in which HF_ENDPOINT was set before anything was imported: one JSON call a line in, one answer a line out.

{"do": "resolve", "reference", "cache_dir"} | {"do": "rows", "reference", "file", "cache_dir"} → {"ok": …} or
{"error": {"code", "message"}}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from heft_engine.data.hub import load_hub_rows
from heft_engine.errors import EngineError
from heft_engine.model.base_models import load_tokenizer, resolve


def answer(call: dict[str, Any]) -> Any:
    cache_dir = Path(call["cache_dir"])
    if call["do"] == "rows":
        return list(load_hub_rows(call["reference"], call["file"], cache_dir=cache_dir))
    base = resolve(call["reference"], cache_dir=cache_dir)
    load_tokenizer(base.path)
    files = sorted(path.name for path in base.path.iterdir())
    return {"source": base.source, "revision": base.revision, "path": str(base.path), "files": files}


def main() -> None:
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            said = {"ok": answer(json.loads(line))}
        except EngineError as error:
            said = {"error": {"code": error.code, "message": error.message}}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
