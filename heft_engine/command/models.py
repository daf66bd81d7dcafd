"""`models`: the base models that work on this machine without a network, one JSON line each."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from heft_engine.base_models import available, resolve
from heft_engine.errors import ModelError
from heft_engine.model_files import inspect


def run(options: argparse.Namespace) -> None:
    """Prints {"id", "source", "revision", "info"}; a model that can't be used is named on stderr and left out."""
    for name in available(options.model_dir):
        try:
            base = resolve(name, model_dir=options.model_dir, cache_dir=options.cache_dir)
            info = asdict(inspect(base.path))
        except ModelError as error:
            print(f"{name} is left out: {error.message}", file=sys.stderr)
            continue
        line = {"id": name, "source": base.source, "revision": base.revision, "info": info}
        print(json.dumps(line), flush=True)
