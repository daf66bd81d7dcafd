"""Probes: what is there, and what is still coming."""

from __future__ import annotations

import httpx

from store import models
from store.db.session import SessionFactory, transaction


def test_readiness_says_what_is_still_coming(client: httpx.Client, sessions: SessionFactory) -> None:
    coming = client.get("/readyz").json()
    assert coming["status"] == "ok"
    assert [part.partition(":")[0] for part in coming["coming"]] == ["base models"]
    with transaction(sessions) as session:
        models.offer_base(session, model_id="tiny", source="directory", info={})
    assert client.get("/readyz").json() == {"status": "ok", "coming": []}
