"""All diagnostics of one bundle: its base with and without its LoRA stages, on some rows of its task.

    weights           heft_engine.diagnostics.spectra: spectra, stable ranks, intruder dimensions and their repair
    representations   heft_engine.diagnostics.representations, at the layer and position of stage 2
    curvature         heft_engine.diagnostics.curvature, of the same fresh intervention in both models: the one that
                      the run itself began with
    descent           heft_engine.diagnostics.descent: steps to a given loss, from that intervention
    forgetting        mean loss (nats a token) on general text, of the base and after each stage. A ReFT stage that
                      went on with an earlier one's intervention has left only the last state of it: both count there

"before" is the base, "after" the base with every LoRA stage merged; interventions that were trained are in neither. A
model without a LoRA stage has no "after". Everything is computed in float32. It does NOT know jobs or services.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from heft_engine.adapters.lora.weights import weight_of
from heft_engine.bundle.format import Bundle, check_tokenizer, read_bundle
from heft_engine.config.train import ReftStage
from heft_engine.data.encoding import Encoder
from heft_engine.data.general_text import general_examples
from heft_engine.data.rows import Row
from heft_engine.data.task import Task
from heft_engine.diagnostics import descent, plots
from heft_engine.diagnostics.curvature import Place, begin, curvature
from heft_engine.diagnostics.representations import compare, describe, states
from heft_engine.diagnostics.spectra import weight_report
from heft_engine.errors import ConfigError, RowError
from heft_engine.evaluation.evaluate import mean_loss
from heft_engine.model.auto_settings import auto_layer, auto_learning_rate, stage_layers
from heft_engine.model.base_models import load_tokenizer
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.predictor import assemble
from heft_engine.training.schedule import derived_seed

Part = Literal["weights", "representations", "curvature", "descent", "forgetting"]
PARTS: tuple[Part, ...] = get_args(Part)
REPORT = "diagnostics.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is looked at. `target`: the loss of `descent`; None is the lowest that both models reach."""

    parts: tuple[Part, ...] = PARTS
    rows: int = 256  #: of representations
    curvature_rows: int = 64  #: of curvature and descent
    lanczos_steps: int = 30
    probes: int = 20
    descent_steps: int = 60
    target: float | None = None
    general: str | None = None  #: text in place of Python's documentation


def diagnose(
    bundle_dir: Path,
    rows: Sequence[Row],
    out_dir: Path,
    options: Options | None = None,
    *,
    on_forward: Callable[[], None] = lambda: None,
    **places: Any,
) -> dict[str, Any]:
    """Writes diagnostics.json and a plot for each part into a new or empty directory; returns what the file holds.

    `places` are model_dir, cache_dir, allow_paths and device, as for `load`. Raises ConfigError, RowError, BundleError.
    """
    options = options or Options()
    bundle = read_bundle(bundle_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty", param="out")
    if not rows:
        raise RowError("there are no rows to look at", param="data")
    tokenizer = load_tokenizer(bundle.path / "tokenizer")
    check_tokenizer(bundle.info, tokenizer)
    encoder = Encoder(tokenizer, Task.from_json(bundle.info.task), bundle.info.max_length)
    lm = assemble(replace(bundle, adapters=[], interventions=[]), dtype=torch.float32, **places)
    lm.on_forward = on_forward
    report = _Diagnosis(bundle, encoder, lm, rows, options).report()
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False))
    plots.write(report, out_dir)
    return report


class _Diagnosis:
    """One pass: the base is measured, stages are put on it one by one, what they came to is measured."""

    def __init__(
        self, bundle: Bundle, encoder: Encoder, lm: PackedLM, rows: Sequence[Row], options: Options
    ) -> None:
        self.bundle = bundle
        self.lm = lm
        self.options = options
        examples = [example for row in rows[: options.rows] for example in encoder.encode(row)]
        shared = encoder.task.labels is not None and all(example.gold is not None for example in examples)
        self.labels = [int(example.gold or 0) for example in examples] if shared else None
        self.examples = [example.supervised() for example in examples]
        self.general = [example.supervised() for example in general_examples(encoder, options.general)]
        self.stage, self.seed = _stage_two(bundle, lm)
        self.place = Place(
            layer=stage_layers(self.stage)[0],
            positions=self.stage.positions,
            intervention=begin(self.stage.kind, lm.hidden_size, self.stage.rank, self.seed).to(lm.device),
        )

    def report(self) -> dict[str, Any]:
        info, wanted = self.bundle.info, self.options.parts
        report: dict[str, Any] = {
            "object": "diagnostics",
            "method": info.method,
            "base_model": info.base_model.model_dump(),
            "rows": len(self.examples),
            "stage_two": {
                "kind": self.stage.kind,
                "rank": self.stage.rank,
                "layer": self.place.layer,
                "positions": self.place.positions,
                "seed": self.seed,
            },
        }
        adapters = self.bundle.adapters
        if "weights" in wanted and adapters:
            weight = lambda module: weight_of(self.lm.model, module)  # noqa: E731
            report["weights"] = weight_report(adapters, weight, self.lm.on_forward)
        before = self._measure()
        losses = self._put_stages_on() if "forgetting" in wanted or adapters else []
        after = self._measure() if adapters else {}
        report |= self._sides(before, after)
        if "forgetting" in wanted:
            report["forgetting"] = {"losses": losses}
        return report

    def _measure(self) -> dict[str, Any]:
        """Of the model as it stands, without interventions."""
        wanted, options, lm = self.options.parts, self.options, self.lm
        few = self.examples[: options.curvature_rows]
        found: dict[str, Any] = {}
        if "representations" in wanted:
            found["states"] = states(lm, self.examples, self.place.layer, self.place.positions)
        if "curvature" in wanted:
            found["curvature"] = curvature(
                lm, self.place, few, seed=self.seed, steps=options.lanczos_steps, probes=options.probes
            )
        if "descent" in wanted:
            rate = float(self.stage.learning_rate)
            found["descent"] = descent.descend(lm, self.place, few, rate=rate, steps=options.descent_steps)
        return found

    def _sides(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        sides: dict[str, Any] = {}
        if "states" in before and after:
            sides["representations"] = compare(before["states"], after["states"], self.labels)
        elif "states" in before:
            sides["representations"] = {
                "rows": len(before["states"]),
                "before": describe(before["states"], self.labels),
            }
        if "curvature" in before:
            sides["curvature"] = {"before": before["curvature"]}
            sides["curvature"] |= {"after": after["curvature"]} if after else {}
        if "descent" in before:
            rate = float(self.stage.learning_rate)
            curves = descent.compare(before["descent"], after.get("descent"), self.options.target)
            sides["descent"] = {"learning_rate": rate, **curves}
        return sides

    @torch.no_grad()
    def _put_stages_on(self) -> list[dict[str, Any]]:
        """The stages one by one, with the loss on general text after each; adapters stay, interventions go again."""
        losses = [{"after": "base", "stage_index": None, "loss": self._general_loss()}]
        adapters = iter(self.bundle.adapters)
        waiting = [stored.restore(self.lm.hidden_size) for stored in self.bundle.interventions]
        for index, stage in enumerate(self.bundle.info.stages):
            if stage["type"] == "lora":
                next(adapters).merge_into(self.lm.model)
            else:
                mine = (stage["positions"], stage["rank"], stage.get("kind", "loreft"))
                own = [
                    placed
                    for placed in waiting
                    if placed.layer in stage["layers"]
                    and (placed.positions, placed.intervention.rank, placed.intervention.kind) == mine
                ]
                waiting = [placed for placed in waiting if placed not in own]
                self.lm.interventions.extend(own)
            losses.append({"after": stage["type"], "stage_index": index, "loss": self._general_loss()})
        self.lm.interventions.clear()
        return losses

    def _general_loss(self) -> float | None:
        if "forgetting" not in self.options.parts:
            return None
        return mean_loss(self.lm, self.general)


def _stage_two(bundle: Bundle, lm: PackedLM) -> tuple[ReftStage, int]:
    """The bundle's first ReFT stage and the seed it began with; one by default settings where it has none."""
    for index, stage in enumerate(bundle.info.stages):
        if stage["type"] == "reft":
            return ReftStage.model_validate(stage), derived_seed(bundle.info.seed, index)
    rate = auto_learning_rate("reft", lm.parameters)
    default = ReftStage(layers=[auto_layer(lm.n_layers)], learning_rate=rate)
    return default, derived_seed(bundle.info.seed, len(bundle.info.stages))
