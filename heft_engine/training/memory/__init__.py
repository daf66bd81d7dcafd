"""The memory of a stage: what its passes and its cache will take, and layers that take less."""
