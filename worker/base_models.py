"""`python -m worker.base_models`: the base models of this machine, one JSON object a line.

A process of its own, because it takes torch, which the processes that supervise do not load.
It does NOT know the store.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

from heft_engine.base_models import available, resolve
from heft_engine.errors import ModelError
from heft_engine.model_files import inspect

log = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m worker.base_models")
    parser.add_argument("--model-dir", type=Path)
    parser.add_argument("--cache-dir", type=Path)
    options = parser.parse_args()
    for name in available(options.model_dir):
        try:
            base = resolve(name, model_dir=options.model_dir, cache_dir=options.cache_dir)
            info = asdict(inspect(base.path))
        except ModelError as fault:
            log.warning("%s is not offered: %s", name, fault)
            continue
        line = {"id": name, "source": base.source, "revision": base.revision, "info": info}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
