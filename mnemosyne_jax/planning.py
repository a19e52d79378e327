"""What fits where and what takes how long, before anything is loaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, ServeConfig, from_yaml
from mnemosyne_jax.model.inputs import step_shapes
from mnemosyne_jax.serve.budget import TickTime
from mnemosyne_jax.serve.chunking import STEP, largest_fitting
from mnemosyne_jax.serve.cost import CostModel
from mnemosyne_jax.serve.policy import PrefillTimes, prefill_times

# Where the facts of devices are: beside the package in a checkout, in it when installed.
HARDWARE_FOLDERS = Path(__file__).parents[1] / "configs" / "hardware", Path(__file__).parent / "hardware"
ACTIVATION_FRACTION = 0.15  # of a device's memory, kept for a tick's activations and the compiler's temporaries


@dataclass(frozen=True)
class Plan:
    """Bytes per device and the longest context of one request alone, for a model on a mesh of one kind of device.

    `ttft_s` and `tbt_s` are those predicted of `context_tokens`, in chunks of 8184 tokens and programs of eight decode
    rows; None if the hardware is not calibrated.
    """

    weight_bytes_per_device: int
    kv_bytes_per_token: int  # of a request, over all devices
    kv_bytes_per_device: int  # of `context_tokens`
    longest_context_tokens: int
    context_tokens: int
    fits: bool
    ttft_s: float | None = None
    tbt_s: float | None = None


def plan(model: ModelConfig, hardware: HardwareConfig, mesh: MeshSpec, context_tokens: int) -> Plan:
    """The Plan of `model` on `mesh`, each device with the memory of `hardware`, for a context of `context_tokens`.

    Weights are split over spp * tp, keys and values over all three axes. Raises: RequestError if the
    model does not divide over the mesh.
    """
    model.refuse_mesh(mesh)
    dtype_bytes = jnp.dtype(model.dtype).itemsize
    weight_bytes = -(-model.weights * dtype_bytes // (mesh.spp * mesh.tp))
    token_bytes = model.kv_bytes_per_token(dtype_bytes, mesh.tp)
    room = int(hardware.memory_bytes * (1 - ACTIVATION_FRACTION)) - weight_bytes
    longest = max(0, room) * mesh.devices // token_bytes
    known = hardware.fitted and context_tokens > 0
    ttft_s, tbt_s = _alone(model, hardware, mesh, context_tokens) if known else (None, None)
    return Plan(
        weight_bytes_per_device=weight_bytes,
        kv_bytes_per_token=token_bytes,
        kv_bytes_per_device=-(-context_tokens * token_bytes // mesh.devices),
        longest_context_tokens=longest,
        context_tokens=context_tokens,
        fits=context_tokens <= longest,
        ttft_s=ttft_s,
        tbt_s=tbt_s,
    )


def _alone(model: ModelConfig, hardware: HardwareConfig, mesh: MeshSpec, context_tokens: int) -> tuple[float, float]:
    """(TTFT, TBT) in seconds of one request alone on the mesh, in large chunks however long they take."""
    serve = ServeConfig(private_rows=8, chunk_tokens=8184, chunk_buckets=(120, 504, 2040, 8184), idle_tick_s=1e9)
    ticks, groups = tick_time(model, hardware, mesh, serve), mesh.kvp
    rows = ticks.program_rows(0, 0)
    assert rows is not None
    token_s = ticks.cost.program_s(*rows) + ticks.cost.decode_s(context_tokens / groups)
    return times_alone(ticks, serve, context_tokens).alone_s(context_tokens), mesh.spp * token_s


def pages_that_fit(model: ModelConfig, hardware: HardwareConfig, mesh: MeshSpec, page_tokens: int) -> int:
    """Pages in each kvp group, as many as the memory of its devices has room for beside the weights."""
    longest = plan(model, hardware, mesh, 0).longest_context_tokens
    return longest // mesh.kvp // page_tokens


def hardware_of(device_kind: str) -> HardwareConfig:
    """The facts of a kind of device, such as "NVIDIA H100 80GB HBM3", if they are known; else those of a small CPU."""
    known = {path.stem: path for folder in HARDWARE_FOLDERS for path in sorted(folder.glob("*.yaml"))}
    named = [path for name, path in known.items() if name in device_kind.lower()]
    return from_yaml(HardwareConfig, named[0]) if named else HardwareConfig()


def tick_time(model: ModelConfig, hardware: HardwareConfig, mesh: MeshSpec, serve: ServeConfig) -> TickTime:
    """The TickTime of the programs that these settings compile."""
    shapes = step_shapes(serve, mesh)

    @functools.cache
    def program_rows(shared: int, private: int) -> tuple[int, int] | None:
        shape = next((shape for shape in shapes if shape.holds(shared, private)), None)
        return shape and (shape.tokens, shape.shared_slots + shape.shared_tokens)

    cost = CostModel(model, hardware, mesh, jnp.dtype(model.dtype).itemsize)
    return TickTime(cost, program_rows, serve.page_tokens)


def times_alone(ticks: TickTime, serve: ServeConfig, longest: int) -> PrefillTimes:
    """PrefillTimes of prompts up to `longest` tokens, each alone on the mesh, in chunks that keep `idle_tick_s`."""
    cost, groups = ticks.cost, ticks.cost.mesh.kvp

    def tick_s(done: int, tokens: int) -> float:
        shared = groups > 1 and done + tokens > serve.span_tokens
        rows = ticks.program_rows(*((tokens, 0) if shared else (0, tokens)))
        assert rows is not None
        spread = groups if shared else 1
        return cost.program_s(*rows) + cost.chunk_s(tokens, done / spread, tokens / spread)

    def chunk_of(done: int) -> int:
        most = serve.chunk_tokens
        return max(min(STEP, most), largest_fitting(longest, most, lambda n: tick_s(done, n) <= serve.idle_tick_s))

    return prefill_times(chunk_of, tick_s, longest)
