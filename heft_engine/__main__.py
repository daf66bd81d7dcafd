"""The engine from a shell: `python -m heft_engine train|evaluate|predict|export|diagnose|import-pyreft|gpu-check`.

See heft_engine.command.
"""

import sys

from heft_engine.command.main import main

sys.exit(main())
