"""`python fake_worker.py ROLE`: a worker process with the fake engine. Settings come from the environment."""

from worker_bench import FAKE_ENGINE

from store.settings import StoreSettings
from worker.__main__ import run
from worker.celery_app import Role

if __name__ == "__main__":
    import sys

    run(Role(sys.argv[1]), StoreSettings(), engine_command=FAKE_ENGINE)  # type: ignore[call-arg]
