"""Studies with a real model and real rows, through the whole service; STUDIES.md has what came of them."""
