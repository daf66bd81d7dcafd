"""Celery settings that were measured to lose messages, delay requests or end healthy jobs stay off."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from kombu.transport.virtual import base as virtual

from worker.celery_app import Role, worker_app


@pytest.mark.parametrize("role", Role)
def test_messages_are_neither_redelivered_nor_timed_out(role: Role) -> None:
    conf = worker_app("redis://localhost:1/0", role).conf
    assert conf.accept_content == ["json"]
    assert conf.task_ignore_result
    assert not conf.task_acks_late
    assert not conf.task_reject_on_worker_lost
    assert not conf.worker_cancel_long_running_tasks_on_connection_loss
    assert conf.task_time_limit is None
    assert conf.task_soft_time_limit is None


@pytest.mark.parametrize("role", Role)
def test_a_missing_broker_is_retried_and_publishing_fails_fast(role: Role) -> None:
    conf = worker_app("redis://localhost:1/0", role).conf
    assert conf.broker_connection_retry_on_startup
    assert conf.broker_connection_max_retries is None
    assert not conf.task_publish_retry
    options = conf.broker_transport_options
    assert 0 < options["socket_timeout"] <= 3
    assert 0 < options["socket_connect_timeout"] <= 3
    assert options["health_check_interval"] > 0


def test_only_the_inference_worker_prefetches() -> None:
    prefetching = {
        role: not worker_app("redis://localhost:1/0", role).conf.worker_disable_prefetch for role in Role
    }
    assert prefetching == {Role.TRAIN: False, Role.PREPARE: False, Role.INFERENCE: True}
    train = worker_app("redis://localhost:1/0", Role.TRAIN).conf
    assert (train.worker_concurrency, train.worker_prefetch_multiplier) == (1, 1)


class Message:
    def serializable(self) -> dict[str, str]:
        return {"body": "a user's rows"}


class ClosedChannel:
    """A channel whose broker can't be reached."""

    do_restore = True

    def _restore(self, message: Any) -> None:
        raise OSError("the broker is away")


def test_messages_that_can_not_be_requeued_are_dropped_and_not_written_to_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(virtual, "emergency_dump_state", virtual.emergency_dump_state)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    worker_app("redis://localhost:1/0", Role.INFERENCE)
    taken = virtual.QoS(ClosedChannel(), prefetch_count=2)
    taken.append(Message(), 1)
    assert taken.can_consume()
    taken.append(Message(), 2)
    assert not taken.can_consume()
    taken.ack(1)
    assert taken.can_consume()
    taken.restore_unacked_once()
    assert "1 requests are lost" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_only_the_inference_worker_does_without_ack_emulation() -> None:
    ack_emulation = {
        role: worker_app("redis://localhost:1/0", role).conf.broker_transport_options["ack_emulation"]
        for role in Role
    }
    assert ack_emulation == {Role.TRAIN: True, Role.PREPARE: True, Role.INFERENCE: False}
