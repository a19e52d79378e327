"""Other libraries' attention over contiguous keys, to be timed beside ours.

torch is loaded by name, only to be measured: nothing here needs it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.clocks import Clock, jax_clock, torch_clock

LAUNCH_S, TENSOR_FLOPS, READ_BYTES_PER_S = 2e-3, 800e12, 3e12  # what a launch should last; about an H100's rates
COLD_BYTES = 256 << 20  # keys of several caches: with so many between two uses, the second finds none of them cached
PACKAGES = {
    "torch": ("torch",),
    "triton": ("triton",),
    "cudnn": ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
    "cuda runtime": ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"),
}


@dataclass(frozen=True)
class Shape:
    """The last `chunk` positions of `context` tokens attend to all of them, causally; bfloat16."""

    chunk: int
    context: int
    head_dim: int
    query_heads: int
    kv_heads: int

    @property
    def where(self) -> dict[str, int]:
        """The cells of a row."""
        return dict(chunk=self.chunk, context=self.context, head_dim=self.head_dim)

    @property
    def visible(self) -> int:
        """(query, key) pairs in which the query sees the key."""
        return self.chunk * (2 * self.context - self.chunk + 1) // 2

    @property
    def flops(self) -> int:
        """Two products of a multiply and an add each for every visible pair; the softmax is not counted."""
        return 4 * self.query_heads * self.head_dim * self.visible

    @property
    def full_flops(self) -> int:
        """As `flops`, where every query sees every key."""
        return 4 * self.query_heads * self.head_dim * self.chunk * self.context

    @property
    def kv_bytes(self) -> int:
        return 2 * 2 * self.kv_heads * self.head_dim * self.context

    @property
    def calls(self) -> int:
        """How many calls at the speed of the hardware last LAUNCH_S."""
        floor_s = max(self.full_flops / TENSOR_FLOPS, self.kv_bytes / READ_BYTES_PER_S)
        return max(1, round(LAUNCH_S / floor_s))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Random numbers made on the device: timed on zeros, a kernel runs faster than it will."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def torch_sdpa(shape: Shape, calls: int, *, backend: str, folded: bool) -> Clock:
    """torch's attention. `folded`: the heads that share a kv head become rows, as they may where nothing is masked."""
    torch, attention = importlib.import_module("torch"), importlib.import_module("torch.nn.attention")
    group = shape.query_heads // shape.kv_heads
    heads, rows = (shape.kv_heads, shape.chunk * group) if folded else (shape.query_heads, shape.chunk)
    draw = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    qs = [draw(1, heads, rows, shape.head_dim) for _ in range(calls)]
    kvs = [[draw(1, shape.kv_heads, shape.context, shape.head_dim) for _ in "kv"] for _ in range(_copies(shape, calls))]
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=not folded)

    def launch() -> list[Any]:
        with torch.no_grad(), attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
            return [attend(q, *kvs[i % len(kvs)]) for i, q in enumerate(qs)]

    return torch_clock(torch, launch)


def jax_cudnn(shape: Shape, calls: int) -> Clock:
    """jax.nn.dot_product_attention on cuDNN."""
    qs = [normal(i, (1, shape.chunk, shape.query_heads, shape.head_dim)) for i in range(calls)]
    cold, kv_shape = range(_copies(shape, calls)), (1, shape.context, shape.kv_heads, shape.head_dim)
    kvs = [[normal(calls + 2 * i + j, kv_shape) for j in range(2)] for i in cold]
    attend = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"))
    launch = jax.jit(lambda qs, kvs: [attend(q, *kvs[i % len(kvs)]) for i, q in enumerate(qs)])
    return jax_clock(lambda: launch(qs, kvs))


def _copies(shape: Shape, calls: int) -> int:
    """How many keys and values calls take turns at: enough that none is found in a cache."""
    return min(calls, -(-COLD_BYTES // shape.kv_bytes))


RIVALS: Mapping[str, Callable[[Shape, int], Clock]] = {
    "torch cuDNN": functools.partial(torch_sdpa, backend="CUDNN_ATTENTION", folded=False),
    "torch flash": functools.partial(torch_sdpa, backend="FLASH_ATTENTION", folded=False),
    "torch flash folded": functools.partial(torch_sdpa, backend="FLASH_ATTENTION", folded=True),
    "JAX cuDNN": jax_cudnn,
}


def why_absent(name: str) -> str | None:
    """Why a rival cannot be measured at all here, if so."""
    if jax.default_backend() != "gpu":
        return "needs a GPU"
    if name.startswith("torch"):
        try:
            torch = importlib.import_module("torch")
        except (ImportError, OSError) as error:  # OSError: a shared library is missing
            return str(error)
        if not torch.cuda.is_available():
            return "torch sees no GPU"
    return None


def free() -> None:
    """Gives back the device memory of what was measured last: JAX and torch do not share what they hold on to."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


def versions() -> dict[str, str]:
    """Versions, where found, of what else numbers on a GPU depend on: libraries, the driver, every ptxas."""
    found = {}
    for name, packages in PACKAGES.items():
        for package in packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.setdefault(name, importlib.metadata.version(package))
    if jax.default_backend() == "gpu":
        found["jax platform"] = " ".join(jax.devices()[0].client.platform_version.split())
    if driver := _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        found["driver"] = driver.split()[0]
    wheels = importlib.util.find_spec("nvidia")
    folders = list(wheels.submodule_search_locations or ()) if wheels else []
    places = {
        "CUDA_ROOT": [Path(os.environ.get("CUDA_ROOT", "")) / "bin" / "ptxas"],
        "nvidia's wheel": [path for folder in folders for path in sorted(Path(folder).glob("*/bin/ptxas"))],
        "PATH": [Path(shutil.which("ptxas") or "")],
        "toolkit": [Path("/usr/local/cuda/bin/ptxas")],
    }
    for place, paths in places.items():
        for path in paths:
            if path.is_file() and (version := re.search(r"V([\d.]+)", _printed(str(path), "--version"))):
                found[f"ptxas ({place})"] = version[1]
    return found


def _printed(*words: str) -> str:
    """What a command prints; nothing if it cannot be run."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
