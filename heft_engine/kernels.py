"""What stands between the products of a decoder layer, each in one pass over memory: kernels.cpp, compiled on the spot.

torch's own operations go over a pass's activations a dozen times between two products, and on a CPU with matrix units
that takes as long as the products. `load` compiles kernels.cpp (a third of a second, once on a machine) and holds each
function to the operations it stands for, to the bit: a score is the same with the kernels and without. Where there is
no compiler, or one that gives other bits, there are none.

It does NOT know layers or models: tensors go in and come out.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from platformdirs import user_cache_path
from torch import Tensor

from heft_engine.lanes import openmp

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.cpp")
#: No contraction: a product that is added without being rounded has other bits. OpenMP is not linked in: `_library`.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-c"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # Compilers keep to half the width on processors that once ran slower with all of it.
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)
_SECONDS = 120
#: Set to "off", no kernels are compiled or loaded.
_SWITCH = "HEFT_KERNELS"


class Kernels:
    """kernels.cpp's functions for bfloat16 tensors on a CPU. None of them has a gradient.

    What is changed in place must be contiguous. Raises ValueError for tensors of other kinds or shapes: the functions
    see addresses alone, and would write beyond them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
        for name, arguments in {
            "heft_rms_norm": (*(pointer,) * 3, number, number, real),
            "heft_add_rms_norm": (*(pointer,) * 4, number, number, real),
            "heft_rotate": (*(pointer,) * 6, *(number,) * 4),
            "heft_place": (*(pointer,) * 4, *(number,) * 3),
            "heft_gate_silu": (pointer, pointer, number),
        }.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x (…, width), weight (width,): as transformers' LlamaRMSNorm."""
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, width = _size(x)
        _agree(x, weight, out, fits=weight.shape == (width,))
        self._library.heft_rms_norm(_at(x), _at(weight), _at(out), rows, width, epsilon)
        return out

    def add_rms_norm(self, x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """y += x, in place, and the norm of that; both (…, width)."""
        x, out = x.contiguous(), torch.empty_like(y)
        rows, width = _size(y)
        _agree(x, y, weight, out, fits=x.shape == y.shape and weight.shape == (width,))
        self._library.heft_add_rms_norm(_at(x), _at(y), _at(weight), _at(out), rows, width, epsilon)
        return out

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor, places: Tensor, gaps: Tensor) -> Tensor:
        """Rotary embedding of x (rows, heads, width), cosine and sine (rows, width), each row at its place.

        places (rows,) and gaps (n,), int64: where a row goes and where nothing is, all of 0 … rows + n − 1. Returns
        (rows + n, heads, width), zero at the gaps.
        """
        rows, heads, width = x.shape
        out = x.new_empty(rows + len(gaps), heads, width)
        fits = cosine.numel() == sine.numel() == rows * width and len(places) == rows
        _agree(x, cosine, sine, fits=fits)
        tensors = (x, cosine, sine, places, gaps, out)
        self._library.heft_rotate(*map(_at, tensors), rows, len(gaps), heads, width)
        return out

    def place(self, x: Tensor, places: Tensor, gaps: Tensor) -> Tensor:
        """x (rows, heads, width) as `rotate` places it, as it is."""
        out = x.new_empty(len(x) + len(gaps), *x.shape[1:])
        _agree(x, fits=len(places) == len(x))
        self._library.heft_place(*map(_at, (x, places, gaps, out)), len(x), len(gaps), x[0].numel())
        return out

    def gate_silu(self, gate: Tensor, up: Tensor) -> Tensor:
        """SiLU(gate) · up, in place of `gate`; both of one shape."""
        _agree(gate, up, fits=gate.shape == up.shape)
        self._library.heft_gate_silu(_at(gate), _at(up), gate.numel())
        return gate


@lru_cache(maxsize=1)
def load(cache_dir: Path | None = None) -> Kernels | None:
    """The kernels, compiled if need be and tried out; None where that can't be, which is logged once.

    `cache_dir` None means the user's own cache.
    """
    if os.environ.get(_SWITCH, "").lower() == "off":
        return None
    try:
        kernels = Kernels(_library((cache_dir or user_cache_path("heft")) / "kernels"))
        wrong = _wrong(kernels)
    except (OSError, subprocess.SubprocessError, _Unfit) as error:
        log.info("no compiled kernels, torch's own operations instead: %s", error)
        return None
    if wrong:
        log.info("no compiled kernels, torch's own operations instead: %s gives other bits here", wrong)
        return None
    return kernels


def compiler() -> str | None:
    """A C++ compiler's path."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


class _Unfit(Exception):
    """What stands against kernels on this machine."""


def _library(directory: Path) -> ctypes.CDLL:
    """Raises OSError, SubprocessError and _Unfit."""
    # The kernels find the runtime that torch has. A second one beside it would have threads of its own, which wait
    # awake where torch's want to compute.
    if openmp() is None:
        raise _Unfit("torch has no OpenMP runtime, or several")
    found = compiler()
    if found is None:
        raise _Unfit("there is no C++ compiler")
    name = f"{_key(found)}.so"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = directory.stat()
        if place.st_uid != os.geteuid() or place.st_mode & 0o022:
            raise PermissionError(f"others may leave code in {directory}")
        return _compiled(found, directory / name)
    except OSError as error:
        log.info("compiled kernels can't be kept, and are compiled for this process alone: %s", error)
    with tempfile.TemporaryDirectory(prefix="heft-kernels-") as scratch:
        return _compiled(found, Path(scratch) / name)


def _compiled(compiler: str, target: Path) -> ctypes.CDLL:
    if not target.is_file():
        _compile(compiler, target)
    return ctypes.CDLL(str(target))


def _key(compiler: str) -> str:
    """Of the machine too: a home directory may be shared by several kinds."""
    with open("/proc/cpuinfo") as info:
        processor = [line for line in info if line.startswith(("model", "flags", "Features", "CPU part"))][:4]
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_SECONDS
    ).stdout
    parts = (_SOURCE.read_bytes(), version, repr((_FLAGS, processor)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _compile(compiler: str, target: Path) -> None:
    """Under another name first: whoever finds the target finds it whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        compiled, linked = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        _run([compiler, *_FLAGS, str(_SOURCE), "-o", str(compiled)])
        _run([compiler, "-shared", str(compiled), "-o", str(linked)])
        linked.replace(target)


def _run(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    if ended.returncode:
        raise _Unfit(f"{command[0]} failed: {ended.stderr.strip()[-500:]}")


@torch.inference_mode()
def _wrong(kernels: Kernels) -> str | None:
    """The name of the first function that gives other bits than torch's operations, if there is one."""
    made = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).bfloat16()

    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gates = every[every.isfinite()]
    for gate, up in ((gates, torch.ones_like(gates)), (some(320), some(320))):
        if not torch.equal(kernels.gate_silu(gate.clone(), up), F.silu(gate) * up):
            return "the gated activation"
    for width in (50, 64, 576, 2_048, 4_100, 18_432):
        x, y, weight = some(40, width), some(40, width), some(width)
        if not torch.equal(kernels.rms_norm(x, weight, 1e-5), _rms_norm(x, weight, 1e-5)):
            return "the norm"
        total = y.clone()
        normed = kernels.add_rms_norm(x, total, weight, 1e-5)
        if not (torch.equal(total, x + y) and torch.equal(normed, _rms_norm(x + y, weight, 1e-5))):
            return "the sum and its norm"
    order = torch.randperm(100, generator=made)
    places, gaps = order[:90].contiguous(), order[90:].contiguous()
    for width in (8, 64, 72, 128):
        x, cosine, sine = some(90, 5, width), some(90, width), some(90, width)
        turned = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
        rotated = x * cosine[:, None] + turned * sine[:, None]
        placed = [x.new_zeros(100, 5, width).index_copy_(0, places, each) for each in (x, rotated)]
        if not torch.equal(kernels.place(x, places, gaps), placed[0]):
            return "placing"
        if not torch.equal(kernels.rotate(x, cosine, sine, places, gaps), placed[1]):
            return "the rotary embedding"
    return None


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    single = x.float()
    return weight * (single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _size(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return x.numel() // width, width


def _agree(*tensors: Tensor, fits: bool) -> None:
    if not fits or any(x.dtype != torch.bfloat16 or not x.is_contiguous() for x in tensors):
        described = [(tuple(x.shape), x.dtype, x.stride()) for x in tensors]
        raise ValueError(f"kernels take contiguous bfloat16 tensors that fit together, not {described}")


def _at(x: Tensor) -> int:
    return x.data_ptr()
