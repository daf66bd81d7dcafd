"""The engine's command line: `python -m heft_engine train|evaluate|predict|export|diagnose|import-pyreft|gpu-check`.

See heft_engine.commands.
"""

import sys

from heft_engine.commands.main import main
from heft_engine.runtime.malloc import retain_freed_memory

if sys.argv[1:2] in (["evaluate"], ["predict"]):
    retain_freed_memory()
sys.exit(main())
