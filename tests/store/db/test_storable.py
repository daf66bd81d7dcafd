"""Text and numbers from outside that Postgres has no place for: an outcome is stored whatever it quotes."""

from __future__ import annotations

import math

import pytest

from store.jobs import endings, leases


@pytest.mark.parametrize("text", ["\0", "a\ud800b", "\udfff\0", "\\u0000"])
def test_an_error_that_quotes_what_postgres_refuses_ends_its_job(bench, text: str) -> None:
    shown = text.replace("\0", "\ufffd").replace("\ud800", "\ufffd").replace("\udfff", "\ufffd")
    error = {"code": "invalid_training_file", "message": f"unknown field {text!s}", "param": text}
    job = bench.do(endings.finish_failed, bench.running(), error=error, report={"faults": [{text: [text]}]})
    stored = bench.get(job.id)
    assert stored.error == {**error, "message": f"unknown field {shown}", "param": shown}
    assert stored.validation == {"faults": [{shown: [shown]}]}
    assert bench.events(job.id)[-1].data["error"]["param"] == shown


def test_a_number_that_json_has_not_is_null(bench) -> None:
    metrics = {"loss": math.nan, "losses": [1.5, math.inf, (-math.inf, 2)], "step": 1}
    claim = bench.running()
    bench.do(leases.record_event, claim, code="METRICS", message="step\0", data=metrics)
    event = bench.events(claim.job_id)[-1]
    assert event.message == "step\ufffd"
    assert event.data.items() >= {"loss": None, "losses": [1.5, None, [None, 2]], "step": 1}.items()
