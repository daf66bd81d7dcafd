"""Settings made concrete: every "auto" replaced by what it means for this model, every bound checked against it.

The rules are written in docs/settings.md too. It does NOT load or change models.
"""

from __future__ import annotations

from heft_engine.config.train import DEFAULT_MAX_LENGTH, LoraStage, ReftStage, Stage, parse_positions
from heft_engine.errors import ConfigError
from heft_engine.model.families import Family

#: The paper's learning rate (stage 2) and model: 2e-4 at 7 billion parameters.
PAPER_RATE = 2e-4
PAPER_PARAMETERS = 7e9
#: rate = 2e-4 · (7e9 / parameters)^exponent, never above the ceiling. The exponents put SmolLM2-135M at 5e-4 and 2e-3.
RATE_EXPONENT = {"lora": 0.232, "reft": 0.583}
RATE_CEILING = {"lora": 5e-3, "reft": 2e-2}
PAPER_DEPTH = 15 / 32


def auto_learning_rate(stage_type: str, parameters: int) -> float:
    """The default learning rate of a stage for a model of so many parameters, two digits."""
    rate = PAPER_RATE * (PAPER_PARAMETERS / max(parameters, 1)) ** RATE_EXPONENT[stage_type]
    return float(f"{min(max(rate, PAPER_RATE / 2), RATE_CEILING[stage_type]):.1e}")


def auto_layer(n_layers: int) -> int:
    """The paper's relative depth, layer 15 of 32."""
    return min(round(PAPER_DEPTH * n_layers), n_layers - 1)


def resolve_stage(stage: Stage, family: Family, *, n_layers: int, hidden_size: int, parameters: int) -> Stage:
    """The stage with nothing left on "auto". Raises ConfigError naming the setting that this model does not allow."""
    rate = stage.learning_rate
    if rate == "auto":
        rate = auto_learning_rate(stage.type, parameters) * stage.learning_rate_multiplier
    common = {"learning_rate": rate, "learning_rate_multiplier": 1.0}
    if isinstance(stage, LoraStage):
        _check_layers(stage.layers or [], n_layers, "lora.layers")
        modules = list(family.attention) if stage.target_modules == "auto" else stage.target_modules
        return stage.model_copy(update={**common, "target_modules": modules})
    layers = [auto_layer(n_layers)] if stage.layers == "auto" else stage.layers
    _check_layers(layers, n_layers, "reft.layers")
    if stage.rank > hidden_size:
        message = f"reft.rank is {stage.rank}, but the model's hidden states have {hidden_size} dimensions"
        raise ConfigError(message, param="reft.rank")
    parse_positions(stage.positions)
    return stage.model_copy(update={**common, "layers": layers})


def resolve_max_length(wanted: int | None, model_limit: int | None) -> int:
    """Tokens a row may have. Raises ConfigError when more is asked for than the model takes."""
    limit = model_limit or DEFAULT_MAX_LENGTH
    if wanted is not None and wanted > limit:
        raise ConfigError(f"max_length is {wanted}, but this model takes {limit} tokens", param="max_length")
    return wanted or min(limit, DEFAULT_MAX_LENGTH)


def _check_layers(layers: list[int], n_layers: int, param: str) -> None:
    for layer in layers:
        if layer >= n_layers:
            message = f"{param} names layer {layer}, but the model has layers 0 to {n_layers - 1}"
            raise ConfigError(message, param=param)


def stage_layers(stage: ReftStage) -> list[int]:
    """The layers of a resolved stage."""
    assert stage.layers != "auto"
    return stage.layers
