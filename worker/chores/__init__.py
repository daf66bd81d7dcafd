"""Periodic tasks of a worker process beside its Celery tasks."""
