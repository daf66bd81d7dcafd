"""The engine from a shell: `python -m heft_engine train|evaluate|predict|export|diagnose|import-pyreft|gpu-check`.

See heft_engine.commands.
"""

import sys

from heft_engine.commands.main import main
from heft_engine.runtime.malloc import keep_freed

if sys.argv[1:2] in (["evaluate"], ["predict"]):
    keep_freed()
sys.exit(main())
