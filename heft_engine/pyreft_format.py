"""pyreft's intervention directory, written and read without pyreft or pyvene being installed.

    config.json          pyvene's IntervenableConfig: where each intervention sits, and its class
    intkey_<key>.bin     one torch file each: rotate_layer (hidden, rank), weight (rank, hidden), bias (rank,)
    heft.json            ours, ignored by pyreft: positions, task, base model, for which pyreft has no field

`pyreft.ReftModel.load(directory, model)` reads it onto the merged base. pyreft 0.1.0 makes W and b bfloat16 there,
whatever the files hold, and then can't multiply them with float32 states. On a float32 base two lines undo that:

    for key, intervention in reft_model.interventions.items():
        intervention.learned_source.float()
        intervention.load_state_dict(torch.load(f"{directory}/intkey_{key}.bin"))

Reading opens pickles (with `weights_only`), so it is for library users and the command line, never for the service.
It does NOT know training or models.
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

from heft_engine.bundle import Bundle, StoredSite
from heft_engine.config import parse_positions
from heft_engine.errors import BundleError

_LOREFT = "pyreft.interventions.LoreftIntervention"
#: pyvene's RepresentationConfig, in its order: a saved representation is a plain list.
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
#: Fields that change what an intervention computes, in ways that this engine does not have.
_FOREIGN = ("subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation")
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError)


def write_pyreft(bundle: Bundle, out_dir: Path) -> None:
    """Writes a bundle's interventions, in their order, into an existing directory."""
    sites = bundle.interventions
    representations = [
        {"layer": site.layer, "component": "block_output", "unit": "pos", "max_number_of_units": 1}
        | {"low_rank_dimension": site.rank}
        for site in sites
    ]
    keys = _keys(representations)
    hidden_sizes = [site.state["rotate_layer"].shape[0] for site in sites]
    config = {
        "intervention_constant_sources": [True] * len(sites),
        "intervention_dimensions": hidden_sizes,
        "intervention_types": [f"<class '{_LOREFT}'>"] * len(sites),
        "mode": "parallel",
        "representations": [[fields.get(name) for name in _FIELDS] for fields in representations],
        "sorted_keys": keys,
    }
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    for key, site in zip(keys, sites, strict=True):
        torch.save(site.state, out_dir / _file(key))
    ours = {
        "base_model": bundle.info.base_model.model_dump(),
        "merged_adapters": len(bundle.adapters),
        "task": bundle.info.task,
        "max_length": bundle.info.max_length,
        "interventions": [
            {"key": key, "layer": site.layer, "rank": site.rank, "positions": site.positions}
            for key, site in zip(keys, sites, strict=True)
        ],
    }
    (out_dir / "heft.json").write_text(json.dumps(ours, indent=1))


def read_pyreft(directory: Path, *, positions: str | Sequence[str] | None = None) -> list[StoredSite]:
    """The interventions of a directory that `reft_model.save` or `write_pyreft` wrote, in pyvene's order.

    `positions` is what they were trained at, for all or one by one: pyreft does not store it. None takes it from the
    heft.json that `write_pyreft` leaves. Raises BundleError for anything but LoReFT at the output of decoder layers.
    """
    config = _read_json(directory / "config.json")
    try:
        representations = [dict(zip(_FIELDS, entry, strict=False)) for entry in config["representations"]]
        kinds = [re.sub(r"^<class '(.*)'>$", r"\1", kind) for kind in config["intervention_types"]]
    except (KeyError, TypeError) as error:
        raise BundleError(f"{directory.name}/config.json is not pyvene's: {error!r}") from error
    foreign = next((kind for kind in kinds if kind != _LOREFT), None)
    if foreign is not None:
        raise BundleError(f"interventions of kind {foreign} are not known, only {_LOREFT}")
    if not representations or len(kinds) != len(representations):
        raise BundleError(f"{directory.name}/config.json names no interventions, or not each one's class")
    layers = [_layer(fields) for fields in representations]
    places = _positions(directory, positions, len(layers))
    return [
        _site(directory / _file(key), layer, place)
        for key, layer, place in zip(_keys(representations), layers, places, strict=True)
    ]


def _keys(representations: Iterable[dict[str, Any]]) -> list[str]:
    """pyvene's names: two interventions at one place are told apart by a running number."""
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
    """The decoder layer whose output a representation means, by either of pyvene's two ways of naming it."""
    odd = [name for name in _FOREIGN if fields.get(name) is not None]
    if odd or fields.get("unit") != "pos" or fields.get("max_number_of_units") != 1:
        raise BundleError(
            f"interventions with {', '.join(odd) or 'units other than one token'} are not known"
        )
    component, layer = str(fields.get("component")), fields.get("layer")
    if component == "block_output" and isinstance(layer, int) and layer >= 0:
        return layer
    named = re.fullmatch(r"[\w.]*layers\[(\d+)\]\.output", component)
    if named is None:
        raise BundleError(f"interventions at {component} are not known, only at the output of decoder layers")
    return int(named[1])


def _positions(directory: Path, given: str | Sequence[str] | None, count: int) -> list[str]:
    if given is None:
        if not (directory / "heft.json").exists():
            raise BundleError("pyreft does not store at which positions an intervention acts: give positions")
        entries = _read_json(directory / "heft.json").get("interventions", [])
        given = [str(entry.get("positions")) for entry in entries]
    places = [given] * count if isinstance(given, str) else list(given)
    if len(places) != count:
        raise BundleError(f"{len(places)} positions for {count} interventions")
    try:
        for place in places:
            parse_positions(place)
    except ValueError as error:
        raise BundleError(str(error)) from error
    return places


def _site(path: Path, layer: int, positions: str) -> StoredSite:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise BundleError(f"{path.name} can't be read: {error}") from error
    state = _state(path.name, content)
    hidden_size, rank = state["rotate_layer"].shape
    site = StoredSite(layer=layer, positions=positions, rank=rank, state=state)
    try:
        site.site(hidden_size)
    except BundleError as error:
        raise BundleError(f"{path.name} holds no rotation: {error.message}") from error
    return site


def _state(name: str, content: Any) -> dict[str, Tensor]:
    names = ("rotate_layer", "weight", "bias")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), Tensor) for part in names):
        raise BundleError(f"{name} does not hold {', '.join(names)}")
    state = {part: content[part].detach().float().contiguous() for part in names}
    shapes = [tuple(state[part].shape) for part in names]
    hidden_size, rank = shapes[0] if len(shapes[0]) == 2 else (0, 0)
    if shapes != [(hidden_size, rank), (rank, hidden_size), (rank,)] or not 0 < rank <= hidden_size:
        raise BundleError(f"{name}: the shapes of {', '.join(names)} don't fit together: {shapes}")
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{path.parent.name}/{path.name} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path.parent.name}/{path.name} is not an object")
    return content
