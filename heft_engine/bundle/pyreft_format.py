"""pyreft's intervention directory, written and read without pyreft or pyvene being installed.

    config.json          pyvene's IntervenableConfig: each intervention's place and class
    intkey_<key>.bin     one torch file each. LoReFT: rotate_layer (hidden, rank), weight (rank, hidden), bias (rank,);
                         the other kinds: the state_dict of pyreft's module, R as the raw parametrisation
    heft.json            ignored by pyreft: positions, task and base model, for which it has no field

`pyreft.ReftModel.load(directory, model)` reads it onto the merged base model. pyreft 0.1.0 casts W and b to bfloat16
and then can't multiply them with float32 states. For a float32 base model two lines undo that:

    for key, intervention in reft_model.interventions.items():
        intervention.learned_source.float()
        intervention.load_state_dict(torch.load(f"{directory}/intkey_{key}.bin"))

pyreft 0.1.0 can't load its own NoReFT and NodiReFT, which lack `add_bias` (KeyError): there, give the ReftConfig
interventions made with add_bias=False, and let each load its file.

Reading opens pickles (with `weights_only`), so it is for library users and the command line, never for the service.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heft_engine.adapters.reft import KINDS, LobireftIntervention, hidden_size_of
from heft_engine.bundle.format import Bundle, StoredIntervention
from heft_engine.config.train import InterventionKind, parse_positions
from heft_engine.errors import BundleError

_CLASSES = {f"pyreft.interventions.{cls.__name__}": cls.kind for cls in KINDS.values()}
_CLASS_OF = {kind: name for name, kind in _CLASSES.items()}
_RAW_ROTATION = "rotate_layer.parametrizations.weight."
#: Names of an exported state's tensors in the state_dict of pyreft's modules.
_PARTS = {
    "proj_layer": ("proj_layer.weight",),
    "weight": ("learned_source.weight",),
    "bias": ("learned_source.bias", "learned_source"),
}
#: The fields of pyvene's RepresentationConfig, in the order of a saved representation, which is a list.
_FIELDS = (
    "layer",
    "component",
    "unit",
    "max_number_of_units",
    "low_rank_dimension",
    "intervention_type",
    "intervention",
    "subspace_partition",
    "group_key",
    "intervention_link_key",
    "moe_key",
    "source_representation",
    "hidden_source_representation",
    "latent_dim",
)
#: Fields that change an intervention's computation in ways that this engine does not support.
_UNSUPPORTED = (
    "subspace_partition",
    "group_key",
    "intervention_link_key",
    "moe_key",
    "source_representation",
)
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError)


def write_pyreft(bundle: Bundle, out_dir: Path) -> None:
    """Writes a bundle's interventions, in their order, into an existing directory."""
    interventions = bundle.interventions
    representations = [
        {"layer": intervention.layer, "component": "block_output", "unit": "pos", "max_number_of_units": 1}
        | {"low_rank_dimension": intervention.rank}
        for intervention in interventions
    ]
    keys = _keys(representations)
    hidden_sizes = [hidden_size_of(intervention.state) for intervention in interventions]
    config = {
        "intervention_constant_sources": [True] * len(interventions),
        "intervention_dimensions": hidden_sizes,
        "intervention_types": [f"<class '{_CLASS_OF[intervention.kind]}'>" for intervention in interventions],
        "mode": "parallel",
        "representations": [[fields.get(name) for name in _FIELDS] for fields in representations],
        "sorted_keys": keys,
    }
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    for key, intervention in zip(keys, interventions, strict=True):
        torch.save(_content(intervention), out_dir / _file(key))
    heft_record = {
        "base_model": bundle.info.base_model.model_dump(),
        "merged_adapters": len(bundle.adapters),
        "task": bundle.info.task,
        "max_length": bundle.info.max_length,
        "interventions": [
            {
                "key": key,
                "layer": intervention.layer,
                "kind": intervention.kind,
                "rank": intervention.rank,
                "positions": intervention.positions,
            }
            for key, intervention in zip(keys, interventions, strict=True)
        ],
    }
    (out_dir / "heft.json").write_text(json.dumps(heft_record, indent=1))


def read_pyreft(directory: Path, *, positions: str | Sequence[str] | None = None) -> list[StoredIntervention]:
    """Reads the interventions of a directory that `reft_model.save` or `write_pyreft` wrote, in pyvene's order.

    `positions`, for all or for each, are those of the training, which pyreft does not store; by default they are read
    from the heft.json of `write_pyreft`. Raises BundleError for anything but ReFT at the output of decoder layers.
    """
    config = _read_json(directory / "config.json")
    try:
        representations = [dict(zip(_FIELDS, entry, strict=False)) for entry in config["representations"]]
        classes = [re.sub(r"^<class '(.*)'>$", r"\1", kind) for kind in config["intervention_types"]]
    except (KeyError, TypeError) as error:
        raise BundleError(f"{directory.name}/config.json is not pyvene's: {error!r}") from error
    unknown = next((name for name in classes if name not in _CLASSES), None)
    if unknown is not None:
        raise BundleError(f"interventions of kind {unknown} are not known, only {', '.join(_CLASSES)}")
    if not representations or len(classes) != len(representations):
        raise BundleError(f"{directory.name}/config.json must name interventions, each with its class")
    layers = [_layer(fields) for fields in representations]
    places = _positions(directory, positions, len(layers))
    return [
        _read_intervention(directory / _file(key), layer, place, _CLASSES[name])
        for key, layer, place, name in zip(_keys(representations), layers, places, classes, strict=True)
    ]


def _keys(representations: Iterable[dict[str, Any]]) -> list[str]:
    """Returns pyvene's names; those at one place differ in a running number."""
    seen: Counter[str] = Counter()
    keys = []
    for fields in representations:
        component, unit, units = fields["component"], fields["unit"], fields["max_number_of_units"]
        place = f"unit_{unit}_nunit_{units}"
        if "." in component:
            name = f"comp_{component.replace('.', '_')}_{place}"
        else:
            name = f"layer_{fields['layer']}_comp_{component}_{place}"
        keys.append(f"{name}#{seen[name]}")
        seen[name] += 1
    return keys


def _file(key: str) -> str:
    return f"intkey_{key}.bin"


def _layer(fields: dict[str, Any]) -> int:
    """Returns the decoder layer whose output a representation names, in either of pyvene's two ways."""
    unsupported = [name for name in _UNSUPPORTED if fields.get(name) is not None]
    if unsupported or fields.get("unit") != "pos" or fields.get("max_number_of_units") != 1:
        raise BundleError(
            f"interventions with {', '.join(unsupported) or 'units other than one token'} are not known"
        )
    component, layer = str(fields.get("component")), fields.get("layer")
    if component == "block_output" and isinstance(layer, int) and layer >= 0:
        return layer
    match = re.fullmatch(r"[\w.]*layers\[(\d+)\]\.output", component)
    if match is None:
        raise BundleError(f"interventions at {component} are not known, only at the output of decoder layers")
    return int(match[1])


def _positions(directory: Path, positions: str | Sequence[str] | None, count: int) -> list[str]:
    if positions is None:
        if not (directory / "heft.json").exists():
            raise BundleError("pyreft does not store at which positions an intervention acts: give positions")
        entries = _read_json(directory / "heft.json").get("interventions", [])
        positions = [str(entry.get("positions")) for entry in entries]
    places = [positions] * count if isinstance(positions, str) else list(positions)
    if len(places) != count:
        raise BundleError(f"{len(places)} positions for {count} interventions")
    try:
        for place in places:
            parse_positions(place)
    except ValueError as error:
        raise BundleError(str(error)) from error
    return places


def _content(intervention: StoredIntervention) -> dict[str, Tensor]:
    """Returns the tensors that pyreft's own module would save, by its names."""
    if intervention.kind == "loreft":
        return intervention.state
    hidden_size = hidden_size_of(intervention.state)
    module = intervention.module(hidden_size)
    module.unfreeze()
    sizes = {name: torch.tensor(hidden_size) for name in ("embed_dim", "interchange_dim")}
    return {**sizes, **module.raw_state()}


def _read_intervention(path: Path, layer: int, positions: str, kind: InterventionKind) -> StoredIntervention:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise BundleError(f"{path.name} can't be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise BundleError(f"{path.name} does not hold tensors by name")
    state = _state(path.name, {name: tensor.detach().float() for name, tensor in content.items()}, kind)
    hidden_size, rank = hidden_size_of(state), len(state["bias"])
    intervention = StoredIntervention(layer=layer, positions=positions, rank=rank, state=state, kind=kind)
    try:
        intervention.restore(hidden_size)
    except BundleError as error:
        raise BundleError(f"{path.name} holds no rotation: {error.message}") from error
    return intervention


def _state(name: str, content: dict[str, Tensor], kind: InterventionKind) -> dict[str, Tensor]:
    if f"{_RAW_ROTATION}original" in content:
        content["rotate_layer"] = _rotation(name, content)
    names = list(KINDS[kind].shapes(1, 1))
    tensors = {
        part: next((content[key] for key in (part, *_PARTS.get(part, ())) if key in content), None)
        for part in names
    }
    state = {part: tensor.contiguous() for part, tensor in tensors.items() if tensor is not None}
    if len(state) < len(names):
        raise BundleError(f"{name} does not hold {', '.join(names)}")
    if kind == "noreft" and "proj_layer.bias" in content:
        state["bias"] = state["bias"] - content["proj_layer.bias"]  # W₁h + b − (W₂h + b₂)
    shapes = {part: tuple(tensor.shape) for part, tensor in state.items()}
    sizes = (max(shapes[names[0]], default=0), shapes["bias"][0] if shapes["bias"] else 0)
    if shapes != KINDS[kind].shapes(*sizes) or not 0 < sizes[1] <= sizes[0]:
        described = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
        raise BundleError(f"{name}: these shapes don't fit together: {described}")
    return state


def _rotation(name: str, content: dict[str, Tensor]) -> Tensor:
    """Returns Rᵀ, computed by torch from the raw tensors of its parametrisation."""
    original, base = content[f"{_RAW_ROTATION}original"], content.get(f"{_RAW_ROTATION}0.base")
    shape = tuple(original.shape)
    if len(shape) != 2 or not 0 < shape[1] <= shape[0] or base is None or base.shape != (shape[0], shape[0]):
        raise BundleError(f"{name}: the rotation's raw parameters don't fit together")
    module = LobireftIntervention(*shape).rotate_layer
    raw = {"parametrizations.weight.original": original, "parametrizations.weight.0.base": base}
    module.load_state_dict(raw)
    return module.weight.detach()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{path.parent.name}/{path.name} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path.parent.name}/{path.name} is not an object")
    return content
