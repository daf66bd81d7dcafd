"""Several processes that train one stage: the division of its rows, and what they exchange in each step."""
