"""Dependencies of routes are coroutines: FastAPI runs each plain function in a thread."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from api import routes


def called(dependant: Dependant) -> Iterator[Callable[..., Any]]:
    """Yields a route's function and those of its dependencies."""
    if dependant.call is not None:
        yield dependant.call
    for each in dependant.dependencies:
        yield from called(each)


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(routes.__path__)])
def test_dependencies_are_coroutines(name: str) -> None:
    router = importlib.import_module(f"api.routes.{name}").router
    routes = [route for route in router.routes if isinstance(route, APIRoute)]
    assert routes
    for route in routes:
        for call in called(route.dependant):
            runs = call if inspect.isfunction(call) else type(call).__call__
            assert inspect.iscoroutinefunction(runs), f"{route.path}: {runs.__qualname__}"
