"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-dir", type=Path, help="a folder of base models, by name")
    parser.add_argument("--cache-dir", type=Path, help="where converted and downloaded models are stored")
    parser.add_argument("--device", help="cpu, cuda, auto; default: the GPU when there is one")


def add_child_argument(parser: argparse.ArgumentParser) -> None:
    """For commands that the worker runs as child processes; main reads it."""
    parser.add_argument(
        "--die-with-parent",
        action="store_true",
        help="end when the parent process ends (stdin is its pipe)",
    )


def add_set_argument(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=examples)


def at_least(least: int) -> Callable[[str], int]:
    """Returns the type of an argument that is a whole number from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"give a whole number from {least} on")
        return value

    return number
