"""A chaos campaign: `python tests/chaos/campaign.py --kills 1000 --seed 7`, or `make chaos N=1000 SEED=7`.

Starts the real stack, has users work with it, kills and freezes and cuts whatever the seed says, lets it come to rest,
and judges. One line of JSON for each campaign is added to `--results`; the exit code is 1 if anything was violated.
Parts with different seeds add up (`summary.py`).
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
from clients.evidence import Evidence
from clients.user import User
from faults.schedule import Injector
from harness.chaos_stack import ChaosStack
from verdict.judge import judge, points

from cli.stack.process import wait_until

HERE = Path(__file__).parent
RESULTS = ledger.FOLDER / "campaigns.jsonl"
#: What a campaign that broke off has to tell of its end.
_NOT_JUDGED: dict[str, Any] = {
    "jobs": {}, "attempts": 0, "outcomes": {}, "resumed_after_damage": 0, "models_checked": 0,
}  # fmt: skip


def run(
    *, kills: int, seed: int, users: int, real_share: float, others: float, keep: Path | None
) -> dict[str, Any]:
    """One campaign; what it did and what it found. `others`: faults that are no kill, for each kill."""
    started = time.monotonic()
    stack = ChaosStack()
    log = Evidence(stack.folder / "client.jsonl")
    injector = Injector(stack, log, seed, others=others)
    try:
        try:
            if real_share > 0:
                _add_real_model(stack.folder / "models" / "tiny")
            stack.wait_until_ready()
            _attack(stack, log, injector, kills=kills, seed=seed, users=users, real_share=real_share)
            found = judge(stack, log)
        except (Exception, KeyboardInterrupt) as reason:  # noqa: BLE001
            # What could not be judged counts as violated, and its kills are told with the rest.
            traceback.print_exc()
            found = {**_NOT_JUDGED, "violations": {"aborted": [_in_words(reason)]}}
        return {
            **ledger.stamp(),
            "seed": seed,
            "seconds": round(time.monotonic() - started),
            **_what_was_done(stack, log, injector),
            **found,
        }
    finally:
        log.close()
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for path in [log.path, *stack.folder.glob("*.log"), *stack.home.logs.glob("*.log")]:
                shutil.copy(path, keep)
        stack.close()


def _what_was_done(stack: ChaosStack, log: Evidence, injector: Injector) -> dict[str, Any]:
    entries = log.entries()
    return {
        "kills": dict(injector.kills),
        "faults": dict(injector.faults),
        "points": points(stack),
        "requests": sum(entry["kind"] == "request" for entry in entries),
        "unanswered": sum(entry["kind"] == "no_answer" for entry in entries),
        "refused_503": sum(entry["kind"] == "answer" and entry["status"] == 503 for entry in entries),
    }


def _in_words(reason: BaseException) -> str:
    first = str(reason).partition("\n")[0]
    return f"{type(reason).__name__}: {first}"[:300]


def _attack(
    stack: ChaosStack,
    log: Evidence,
    injector: Injector,
    *,
    kills: int,
    seed: int,
    users: int,
    real_share: float,
) -> None:
    enough = threading.Event()
    people = [
        User(
            name=f"user-{seed}-{number}", seed=seed, url=stack.url, key=stack.key, log=log, enough=enough,
            patience=300, real_share=real_share,
        )
        for number in range(users)
    ]  # fmt: skip
    for person in people:
        person.start()
    try:
        injector.play(kills)
    finally:
        enough.set()
        log.write("quiet")
        # What was killed last has to be started again for anything to end.
        wait_until(lambda: _all_done(stack, people), seconds=320)


def _all_done(stack: ChaosStack, people: list[User]) -> bool:
    stack.start()
    return not any(person.is_alive() for person in people)


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
        "--real-share", type=float, default=0.03, help="of the jobs, trained by the real engine"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, help="a folder for the client's log and the service's logs")
    parser.add_argument("--others", type=float, default=0.5, help="faults that are no kill, for each kill")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it gets what there is
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
