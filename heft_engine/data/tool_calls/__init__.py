"""The formats in which models write tool calls: how each is parsed, and what its calls consist of."""
