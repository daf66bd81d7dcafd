"""An aborted campaign leaves its result, and a simulated user that fails is a violation."""

from __future__ import annotations

import threading
from pathlib import Path

import campaign
import pytest
from clients import user
from clients.client_log import ClientLog
from harness.chaos_stack import ChaosStack
from summary import campaigns
from verdict import invariants
from verdict.test_invariants import books

from cli.stack.home import Home


class DeadStack(ChaosStack):
    """A stack that never starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = Home.at(folder / "home")
        self.control = folder / "control"

    def wait_until_ready(self, seconds: float = 120) -> None:
        raise AssertionError(f"the stack did not become ready in {seconds} s:\nits log")

    def close(self) -> None:
        pass


def test_a_campaign_that_breaks_off_is_a_violation_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "ChaosStack", lambda: DeadStack(tmp_path))
    result = campaign.run(kills=8, seed=1, users=1, real_share=0.0, others=0.0, keep=None)
    reason = "AssertionError: the stack did not become ready in 120 s:"
    assert result["violations"] == {"aborted": [reason]}
    assert result["kills"] == {}
    assert f"- {result['commit']}, seed 1: aborted: {reason}" in campaigns([result])


def test_a_user_who_can_not_go_on_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ClientLog(tmp_path / "log")
    person = user.User(
        name="u", seed=1, url="http://127.0.0.1:1", key="k", log=log, stop=threading.Event(), timeout=1,
        real_share=0.0,
    )  # fmt: skip
    monkeypatch.setattr(person, "_one_job", lambda: {}["id"])
    with pytest.raises(KeyError):
        person.run()
    log.close()
    assert invariants.one_end(log.entries(), books()) == ["a user gave up: KeyError('id')"]
