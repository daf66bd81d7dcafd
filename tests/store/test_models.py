"""Models: base models and results in one shape; results are seen by their owner alone."""

from __future__ import annotations

import pytest

from store import models
from store.errors import Forbidden, NotFound

OWNER = "team"


def offer(bench, model_id: str = "smollm2-135m", **info: object) -> None:
    bench.do(models.offer_base, model_id=model_id, source="alias", info=info)


def test_base_models_and_own_results_are_listed_together(bench) -> None:
    offer(bench)
    claim = bench.running()
    bench.checkpoint(claim, 10, "stage")
    final = bench.succeed(claim).fine_tuned_model
    listed = bench.do(models.list_models, owner_id=OWNER)
    assert [(model.id, model.kind) for model in listed] == [(final, "final"), ("smollm2-135m", "base")]
    assert [model.kind for model in bench.do(models.list_models, owner_id="others")] == ["base"]


def test_a_result_is_found_by_its_owner_alone(bench) -> None:
    claim = bench.running()
    bench.checkpoint(claim, 10, "stage")
    final = bench.succeed(claim).fine_tuned_model
    model = bench.do(models.get, owner_id=OWNER, model_id=final)
    assert (model.base_model, model.job_id, model.task) == ("smollm2-135m", claim.job_id, {"type": "yes_no"})
    assert bench.do(models.get, owner_id=OWNER, model_id=f"{final}:ckpt-lora").kind == "checkpoint"
    for call in (models.get, models.delete):
        for model_id in (final, f"{final}:ckpt-lora", "unknown"):
            with pytest.raises(NotFound) as refused:
                bench.do(call, owner_id="others", model_id=model_id)
            assert refused.value.code == "model_not_found"


def test_a_deleted_model_is_hidden_but_a_worker_in_the_middle_still_finds_it(bench) -> None:
    final = bench.succeed(bench.running()).fine_tuned_model
    bench.do(models.delete, owner_id=OWNER, model_id=final)
    for call in (models.get, models.delete):
        with pytest.raises(NotFound):
            bench.do(call, owner_id=OWNER, model_id=final)
    assert bench.do(models.list_models, owner_id=OWNER) == []
    assert bench.do(models.for_worker, model_id=final).id == final
    with pytest.raises(NotFound):
        bench.do(models.for_worker, model_id="unknown")


def test_a_base_model_is_not_deleted(bench) -> None:
    offer(bench)
    with pytest.raises(Forbidden):
        bench.do(models.delete, owner_id=OWNER, model_id="smollm2-135m")
    assert bench.do(models.for_worker, model_id="smollm2-135m").kind == "base"


def test_a_base_model_offered_again_is_updated(bench) -> None:
    offer(bench, n_layers=30)
    bench.do(
        models.offer_base, model_id="smollm2-135m", source="alias", revision="abc", info={"n_layers": 31}
    )
    [model] = bench.do(models.list_models, owner_id=OWNER)
    assert model.info == {"n_layers": 31}


def test_which_of_some_models_are_there(bench) -> None:
    claim = bench.running()
    bench.checkpoint(claim, 10, "stage")
    final = bench.succeed(claim).fine_tuned_model
    checkpoint = f"{final}:ckpt-lora"
    ids = [final, checkpoint, "ft:unknown"]
    assert bench.do(models.present, model_ids=ids) == {final, checkpoint}
    bench.do(models.delete, owner_id=OWNER, model_id=final)
    assert bench.do(models.present, model_ids=ids) == {checkpoint}
    assert bench.do(models.present, model_ids=[]) == set()
