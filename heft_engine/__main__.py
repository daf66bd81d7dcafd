"""`python -m heft_engine train|evaluate|predict|export|gpu-check`: the engine from a shell. See heft_engine.command."""

import sys

from heft_engine.command.main import main

sys.exit(main())
