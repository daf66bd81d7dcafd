"""A chaos campaign: `python tests/chaos/campaign.py --kills 1000 --seed 7`, or `make chaos N=1000 SEED=7`.

Starts the real stack with simulated users, injects the faults of the seed, waits until all jobs have ended, and checks
the invariants. One line of JSON is appended to `--results`; the exit code is 1 if an invariant was violated. Campaigns
with different seeds add up (`summary.py`).
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import ledger
from clients.client_log import ClientLog
from clients.user import User
from faults.schedule import Injector
from harness.chaos_stack import ChaosStack
from verdict.judge import judge, points

from cli.stack.process import wait_until

HERE = Path(__file__).parent
RESULTS = ledger.FOLDER / "campaigns.jsonl"
#: The verdict of a campaign that was aborted.
_NOT_JUDGED: dict[str, Any] = {
    "jobs": {}, "attempts": 0, "outcomes": {}, "resumed_after_damage": 0, "models_checked": 0,
}  # fmt: skip


def run(
    *, kills: int, seed: int, users: int, real_share: float, others: float, keep: Path | None
) -> dict[str, Any]:
    """Runs a campaign; returns its statistics and violations. `others`: other faults for each kill."""
    started = time.monotonic()
    stack = ChaosStack()
    log = ClientLog(stack.folder / "client.jsonl")
    injector = Injector(stack, log, seed, others=others)
    try:
        try:
            if real_share > 0:
                _add_real_model(stack.folder / "models" / "tiny")
            stack.wait_until_ready()
            _attack(stack, log, injector, kills=kills, seed=seed, users=users, real_share=real_share)
            verdict = judge(stack, log)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
            # An aborted campaign counts as a violation, and its kills are counted with the others.
            traceback.print_exc()
            verdict = {**_NOT_JUDGED, "violations": {"aborted": [_summary(error)]}}
        return {
            **ledger.stamp(),
            "seed": seed,
            "seconds": round(time.monotonic() - started),
            **_statistics(stack, log, injector),
            **verdict,
        }
    finally:
        log.close()
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for path in [log.path, *stack.folder.glob("*.log"), *stack.home.logs.glob("*.log")]:
                shutil.copy(path, keep)
        stack.close()


def _statistics(stack: ChaosStack, log: ClientLog, injector: Injector) -> dict[str, Any]:
    entries = log.entries()
    return {
        "kills": dict(injector.kills),
        "faults": dict(injector.faults),
        "points": points(stack),
        "requests": sum(entry["kind"] == "request" for entry in entries),
        "unanswered": sum(entry["kind"] == "no_answer" for entry in entries),
        "refused_503": sum(entry["kind"] == "answer" and entry["status"] == 503 for entry in entries),
    }


def _summary(error: BaseException) -> str:
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"[:300]


def _attack(
    stack: ChaosStack,
    log: ClientLog,
    injector: Injector,
    *,
    kills: int,
    seed: int,
    users: int,
    real_share: float,
) -> None:
    stop = threading.Event()
    simulated = [
        User(
            name=f"user-{seed}-{number}", seed=seed, url=stack.url, key=stack.key, log=log, stop=stop,
            timeout=300, real_share=real_share,
        )
        for number in range(users)
    ]  # fmt: skip
    for user in simulated:
        user.start()
    try:
        injector.play(kills)
    finally:
        stop.set()
        log.write("quiet")
        # The stack is started again after its last kill, so that the jobs can end.
        wait_until(lambda: _all_done(stack, simulated), seconds=320)


def _all_done(stack: ChaosStack, users: list[User]) -> bool:
    stack.start()
    return not any(user.is_alive() for user in users)


def _add_real_model(path: Path) -> None:
    sys.path.append(str(HERE.parent / "support"))
    from tiny_models import save_tiny_model

    save_tiny_model(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument(
        "--real-share", type=float, default=0.03, help="share of the jobs that the real engine trains"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, help="folder for copies of the client's and the service's logs")
    parser.add_argument("--others", type=float, default=0.5, help="other faults for each kill")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated campaign still writes its result
    result = run(
        kills=options.kills,
        seed=options.seed,
        users=options.users,
        real_share=options.real_share,
        others=options.others,
        keep=options.keep,
    )
    ledger.add(options.results, result)
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
