"""All diagnostics of a bundle: its base with and without its LoRA stages, on some rows of its task.

    weights           heft_engine.diagnostics.spectra: spectra, stable ranks, intruder dimensions and their repair
    representations   heft_engine.diagnostics.representations, at the layer and position of stage 2
    curvature         heft_engine.diagnostics.curvature, at the initial intervention of the run, in both models
    descent           heft_engine.diagnostics.descent: steps to a loss, from that intervention
    forgetting        mean loss (nats per token) on general text, of the base and after each stage. Where a ReFT stage
                      continued an earlier one's intervention, the bundle has only its final state, used for both

"before" is the base, "after" the base with every LoRA stage merged; neither has trained interventions. A model without
a LoRA stage has no "after". Everything is computed in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from heft_engine.adapters.lora.weights import weight_of
from heft_engine.bundle.assemble import assemble, restore_interventions
from heft_engine.bundle.format import Bundle, added_interventions, check_tokenizer, is_merged, read_bundle
from heft_engine.config.train import ReftStage
from heft_engine.data.encoding import Encoder
from heft_engine.data.general_text import general_examples
from heft_engine.data.rows import Row
from heft_engine.data.task import Task
from heft_engine.diagnostics import descent, plots
from heft_engine.diagnostics.curvature import InitialIntervention, curvature, new_intervention
from heft_engine.diagnostics.representations import compare, describe, states
from heft_engine.diagnostics.spectra import weight_report
from heft_engine.errors import ConfigError, RowError
from heft_engine.evaluation.evaluate import mean_loss
from heft_engine.model.auto_settings import auto_layer, auto_learning_rate, stage_layers
from heft_engine.model.base_models import load_tokenizer
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training.schedule import derived_seed

Part = Literal["weights", "representations", "curvature", "descent", "forgetting"]
PARTS: tuple[Part, ...] = get_args(Part)
REPORT = "diagnostics.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Parts and sizes of a diagnosis. `target`: the loss of `descent`; None: the lowest that both models reach."""

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
    **load_options: Any,
) -> dict[str, Any]:
    """Writes diagnostics.json and a plot for each part into a new or empty directory, and returns the report.

    `load_options`: model_dir, cache_dir, allow_paths and device, as for `load`. Raises ConfigError, RowError and
    BundleError.
    """
    options = options or Options()
    bundle = read_bundle(bundle_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty", param="out")
    if not rows:
        raise RowError("diagnostics need at least one row", param="data")
    tokenizer = load_tokenizer(bundle.path / "tokenizer")
    check_tokenizer(bundle.info, tokenizer)
    encoder = Encoder(tokenizer, Task.from_json(bundle.info.task), bundle.info.max_length)
    lm = assemble(replace(bundle, adapters=[], interventions=[]), dtype=torch.float32, **load_options)
    lm.on_forward = on_forward
    report = _Diagnosis(bundle, encoder, lm, rows, options).report()
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False))
    plots.write(report, out_dir)
    return report


class _Diagnosis:
    """One diagnosis: measures the base, applies the stages one by one, and measures the result."""

    def __init__(
        self, bundle: Bundle, encoder: Encoder, lm: PackedLM, rows: Sequence[Row], options: Options
    ) -> None:
        self.bundle = bundle
        self.lm = lm
        self.options = options
        examples = [example for row in rows[: options.rows] for example in encoder.encode(row)]
        has_labels = encoder.task.labels is not None and all(example.gold is not None for example in examples)
        self.labels = [int(example.gold or 0) for example in examples] if has_labels else None
        self.examples = [example.supervised() for example in examples]
        self.general = [example.supervised() for example in general_examples(encoder, options.general)]
        self.stage, self.seed = _stage_two(bundle, lm)
        intervention = new_intervention(self.stage.kind, lm.hidden_size, self.stage.rank, self.seed)
        self.initial = InitialIntervention(
            layer=stage_layers(self.stage)[0],
            positions=self.stage.positions,
            intervention=intervention.to(lm.device),
        )

    def report(self) -> dict[str, Any]:
        info, parts = self.bundle.info, self.options.parts
        report: dict[str, Any] = {
            "object": "diagnostics",
            "method": info.method,
            "base_model": info.base_model.model_dump(),
            "rows": len(self.examples),
            "stage_two": {
                "kind": self.stage.kind,
                "rank": self.stage.rank,
                "layer": self.initial.layer,
                "positions": self.initial.positions,
                "seed": self.seed,
            },
        }
        adapters = self.bundle.adapters
        if "weights" in parts and adapters:
            report["weights"] = weight_report(adapters, partial(weight_of, self.lm.model), self.lm.on_forward)
        before = self._measure()
        losses = self._apply_stages() if "forgetting" in parts or adapters else []
        after = self._measure() if adapters else {}
        report |= self._before_and_after(before, after)
        if "forgetting" in parts:
            report["forgetting"] = {"losses": losses}
        return report

    def _measure(self) -> dict[str, Any]:
        """Measures the model as it is now, without interventions."""
        options, lm = self.options, self.lm
        examples = self.examples[: options.curvature_rows]
        measured: dict[str, Any] = {}
        if "representations" in options.parts:
            measured["states"] = states(lm, self.examples, self.initial.layer, self.initial.positions)
        if "curvature" in options.parts:
            measured["curvature"] = curvature(
                lm, self.initial, examples, seed=self.seed, steps=options.lanczos_steps, probes=options.probes
            )
        if "descent" in options.parts:
            rate = float(self.stage.learning_rate)
            measured["descent"] = descent.descend(
                lm, self.initial, examples, rate=rate, steps=options.descent_steps
            )
        return measured

    def _before_and_after(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        report: dict[str, Any] = {}
        if "states" in before and after:
            report["representations"] = compare(before["states"], after["states"], self.labels)
        elif "states" in before:
            report["representations"] = {
                "rows": len(before["states"]),
                "before": describe(before["states"], self.labels),
            }
        if "curvature" in before:
            report["curvature"] = {"before": before["curvature"]}
            report["curvature"] |= {"after": after["curvature"]} if after else {}
        if "descent" in before:
            rate = float(self.stage.learning_rate)
            curves = descent.compare(before["descent"], after.get("descent"), self.options.target)
            report["descent"] = {"learning_rate": rate, **curves}
        return report

    @torch.no_grad()
    def _apply_stages(self) -> list[dict[str, Any]]:
        """Applies the stages one by one and returns the loss on general text after each; removes interventions last."""
        losses = [{"after": "base", "stage_index": None, "loss": self._general_loss()}]
        adapters = iter(self.bundle.adapters)
        added = added_interventions(self.bundle.info.stages)
        interventions = iter(restore_interventions(self.bundle.interventions, self.lm))
        for index, stage in enumerate(self.bundle.info.stages):
            if is_merged(stage):
                next(adapters).merge_into(self.lm.model)
            else:
                self.lm.interventions.extend(islice(interventions, len(added[index])))
            losses.append({"after": stage["type"], "stage_index": index, "loss": self._general_loss()})
        self.lm.interventions.clear()
        return losses

    def _general_loss(self) -> float | None:
        if "forgetting" not in self.options.parts:
            return None
        return mean_loss(self.lm, self.general)


def _stage_two(bundle: Bundle, lm: PackedLM) -> tuple[ReftStage, int]:
    """Returns the bundle's first ReFT stage and its seed; without one, a stage with default settings."""
    for index, stage in enumerate(bundle.info.stages):
        if stage["type"] == "reft":
            return ReftStage.model_validate(stage), derived_seed(_seed_of_stage(bundle, index), index)
    rate = auto_learning_rate("reft", lm.parameters)
    default = ReftStage(layers=[auto_layer(lm.n_layers)], learning_rate=rate)
    return default, derived_seed(bundle.info.seed, len(bundle.info.stages))


def _seed_of_stage(bundle: Bundle, index: int) -> int:
    """Returns the seed of the run that trained a stage."""
    before = (ancestor.seed for ancestor in bundle.info.started_from if index < ancestor.stages)
    return next(before, bundle.info.seed)
