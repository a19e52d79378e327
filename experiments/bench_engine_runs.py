"""Engines over random weights, and one request at a time through them: a real prompt, or one that is said to be there.

What a tick takes depends on how many rows and keys it has, not on what they hold: a prompt of 10M tokens that is only
said to be prefilled decodes as a real one does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

import mnemosyne_jax as mn
from mnemosyne_jax.mesh import make_mesh
from mnemosyne_jax.model import cache
from mnemosyne_jax.model.cache import State
from mnemosyne_jax.model.params import abstract, init, weight_bytes_per_device
from mnemosyne_jax.planning import hardware_of
from mnemosyne_jax.runtime import JaxExecutor
from mnemosyne_jax.serve.batch import Batch
from mnemosyne_jax.serve.executor import StepResult
from mnemosyne_jax.serve.request import Sequence, Timeline

WEIGHT_SPREAD = 0.02


@dataclass(frozen=True)
class Measured:
    """One request: seconds to its first token and between tokens, the sizes of its chunks, and the seconds that the
    host was busy in ticks with a chunk and in ticks with a decode row."""

    ttft_s: float
    tbt_s: np.ndarray
    chunks: tuple[int, ...]
    host_s: dict[str, list[float]]


class TimedExecutor(JaxExecutor):
    """Adds up the seconds in which the host waited for a tick's tokens."""

    waited_s = 0.0

    def _result(self) -> StepResult:
        begin_s = time.perf_counter()
        result = super()._result()
        self.waited_s += time.perf_counter() - begin_s
        return result


class TimedEngine(mn.Engine):
    """An Engine over an executor that others have used before: engines that chunk differently share its programs."""

    def __init__(self, executor: TimedExecutor, serve: mn.ServeConfig, hardware: mn.HardwareConfig | None):
        super().__init__(executor.config, executor.params, executor.mesh, serve, hardware=hardware)
        self.executor: TimedExecutor = executor
        self.loop.executor, self.loop.keep_batches = executor, True

    def timed_tick(self) -> tuple[Batch, float]:
        """One tick while a request runs: (its batch, seconds that the host was busy: scheduling, packing, launching).

        On a CPU the host waits in places that are not told apart.
        """
        waited_s, begin_s = self.executor.waited_s, time.perf_counter()
        self.tick()
        busy_s = time.perf_counter() - begin_s - (self.executor.waited_s - waited_s)
        return self.loop.batches.pop(), busy_s

    def drain(self) -> None:
        """Runs what is still in the pipe, so that another engine finds the executor empty."""
        while not self.loop.idle:
            self.tick()
        self.loop.batches.clear()


# What fits.


def pool_pages(serve: mn.ServeConfig, mesh: mn.MeshSpec, total_tokens: int) -> int:
    """Pages of each group that hold one request of so many tokens."""
    pages = -(-total_tokens // serve.page_tokens)
    return pages if total_tokens <= serve.span_tokens else -(-pages // mesh.kvp)


def kv_bytes(target: State) -> int:
    """Bytes of keys and values in each device."""
    kv = target.cache.kv
    return prod(kv.sharding.shard_shape(kv.shape)) * np.dtype(kv.dtype).itemsize


def device_bytes() -> int:
    """Memory that JAX may use on one device; on a CPU, that of the cost model's."""
    device = jax.devices()[0]
    return (device.memory_stats() or {}).get("bytes_limit") or hardware_of(device.device_kind).memory_bytes


def needed_bytes(model: mn.ModelConfig, serve: mn.ServeConfig, mesh: mn.MeshSpec, total_tokens: int) -> int:
    """Bytes per device of weights and of the state for one request of so many tokens."""
    device_mesh, dtype = make_mesh(mesh), jnp.dtype(model.dtype)
    state = cache.abstract(model, serve, device_mesh, dtype, pool_pages(serve, mesh, total_tokens))
    return weight_bytes_per_device(abstract(model, device_mesh, dtype)) + cache.state_bytes_per_device(state)


def peak_bytes() -> int | None:
    """The most memory that was in use on a device since the process began; None where that is not counted."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


# Engines.


def built(model: mn.ModelConfig, serve: mn.ServeConfig, mesh: mn.MeshSpec) -> tuple[TimedExecutor, dict[str, float]]:
    """(an executor with random weights and every program, seconds by what they were spent on)."""
    begin_s, device_mesh = time.perf_counter(), make_mesh(mesh)
    params = jax.block_until_ready(init(model, device_mesh, jnp.dtype(model.dtype), scale=WEIGHT_SPREAD))
    weights_s = time.perf_counter() - begin_s
    executor = TimedExecutor(model, params, serve, device_mesh)
    executor.warmup()
    jax.block_until_ready(executor._allocated())
    return executor, {"weights": weights_s, "programs": time.perf_counter() - begin_s - weights_s}


def fill(executor: JaxExecutor) -> None:
    """Writes random keys and values to all pages of a fresh cache, in place.

    Zeros take less power than real keys. All pages hold the same: as many random numbers as a cache has would need
    several times its memory, and what is read from memory is the same.
    """
    state = executor._allocated()
    kv = state.cache.kv
    page = jax.random.normal(jax.random.key(0), kv.shape[2:], kv.dtype)
    add = jax.jit(lambda kv, page: kv + page, donate_argnums=0, out_shardings=kv.sharding)
    executor._state = replace(state, cache=replace(state.cache, kv=jax.block_until_ready(add(kv, page))))


# Requests.


def random_prompt(tokens: int, vocab: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab, size=tokens, dtype=np.int32)


def run_prompt(engine: TimedEngine, prompt: np.ndarray, new_tokens: int, planted: bool) -> Measured:
    """A prompt through the engine: submitted, prefilled, continued. `planted`: all but its last token is in the cache
    already, so it is said, and the TTFT is that of the last."""
    ticks = []
    if planted:
        sequence = plant(engine, prompt, new_tokens, len(prompt) - 1)
        while not sequence.finished:
            ticks.append(engine.timed_tick())
    else:
        handle = engine.submit(mn.Request("prompt", prompt, new_tokens, stop_ids=()))
        while not handle.finished:
            ticks.append(engine.timed_tick())
        sequence = handle
    engine.drain()
    return _measured(sequence.timeline, sequence.reason, ticks)


def plant(engine: TimedEngine, prompt: np.ndarray, new_tokens: int, done: int) -> Sequence:
    """An admitted Sequence whose first `done` tokens are said to be in the cache: its pages hold whatever they hold.

    The devices learn of a page when it is first written to, and so are told of all of them here.
    """
    scheduler, executor = engine.scheduler, engine.executor
    sequence = scheduler.submit(mn.Request("planted", prompt, new_tokens, stop_ids=()), engine.now())
    scheduler._admit(engine.now())
    if not sequence.spans:
        raise RuntimeError(f"there is no room for {len(prompt)} tokens")
    sequence.prompt_scheduled = sequence.prompt_done = done
    state = executor._allocated()
    table = np.array(state.cache.page_table)
    for span in sequence.spans:
        table[:, span.group, sequence.slot, : len(span.pages)] = span.pages
    table = jax.device_put(table, state.cache.page_table.sharding)
    executor._state = replace(state, cache=replace(state.cache, page_table=table))
    return sequence


def _measured(timeline: Timeline, reason: str, ticks: Seq[tuple[Batch, float]]) -> Measured:
    if reason != "length":
        raise RuntimeError(f"the request ended early: {reason}")
    host_s = {
        "chunk": [busy_s for batch, busy_s in ticks if batch.chunks],
        "decode": [busy_s for batch, busy_s in ticks if batch.decodes],
    }
    chunks = tuple(row.length for batch, _ in ticks for row in batch.chunks)
    return Measured(timeline.ttft_s, timeline.tbt_s, chunks, host_s)
