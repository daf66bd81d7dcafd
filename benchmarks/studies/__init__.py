"""Studies with a real model and real rows through the whole service; the results are in STUDIES.md."""
