"""The engine from a shell: `python -m heft_engine train|evaluate|predict|export|diagnose|import-pyreft|gpu-check`.

See heft_engine.command.
"""

import sys

from heft_engine.command.main import main
from heft_engine.heap import keep_freed

if sys.argv[1:2] in (["evaluate"], ["predict"]):
    keep_freed()
sys.exit(main())
