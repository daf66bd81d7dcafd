"""Whether ctypes was told what a C++ source declares: it believes whatever it is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_KINDS = {"c_void_p": "*", "c_long": "long", "c_float": "float", "c_int": "int"}


def assert_types_are_declared(text: str, take: Callable[[Any], object], prefix: str) -> None:
    """`take` tells a library its functions' argument types: those of all functions that `text` declares under
    `prefix`, and theirs."""
    asked: dict[str, tuple[Any, ...]] = {}

    class Library:
        def __getattr__(self, name: str) -> Any:
            class Function:
                def __setattr__(self, attribute: str, value: Any) -> None:
                    if attribute == "argtypes":
                        asked[name] = value

            return Function()

    take(Library())
    assert sorted(asked) == sorted(re.findall(rf"\nvoid ({prefix}\w+)\(", text))
    assert asked
    for name, types in asked.items():
        declared = text.partition(f"void {name}(")[2].partition(")")[0].split(",")
        kinds = ["*" if "*" in one else one.split()[0] for one in declared]
        assert kinds == [_KINDS[each.__name__] for each in types], name
