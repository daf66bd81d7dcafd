"""Why an attempt of several workers failed: the failure of a member, rather than its consequence on machine 0.

A process that is lost ends those on all machines within seconds. Machine 0 may notice before the member has said why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from heft_engine.errors import RankLost
from store.jobs.groups import MemberFailures

Error = Mapping[str, Any]  #: {code, message, param}

#: Longest wait for members to say why they have failed. Their processes have 10 seconds to end once one is lost.
WAIT_SECONDS = 20.0


def first_cause(
    error: Error,
    read: Callable[[], MemberFailures],
    pause: Callable[[], bool],
    *,
    seconds: float = WAIT_SECONDS,
) -> Error:
    """Returns the error that has led to `error` of machine 0: a member's, or `error` if no member knows more.

    read: reads what members have failed with so far. pause: waits for a moment, and returns True if there is no time to
    wait any longer.
    """
    deadline = time.monotonic() + seconds
    while True:
        failures = read()
        if failures.error is not None and failures.error["code"] != RankLost.code:
            return failures.error
        if failures.have_all_ended or time.monotonic() >= deadline or pause():
            break
    is_consequence = error["code"] == RankLost.code
    # The process that started a lost one knows how it ended.
    return failures.error if is_consequence and failures.error is not None else error
