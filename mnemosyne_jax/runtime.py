"""JaxExecutor: runs batches on a device mesh. Owns params, state, compiled programs and the clock."""

from __future__ import annotations

import logging
import pickle
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mnemosyne_jax.config import ModelConfig, ServeConfig
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.mesh import broadcast, partition, spec_of
from mnemosyne_jax.model import cache
from mnemosyne_jax.model.attention import choose_impl
from mnemosyne_jax.model.inputs import StepShape, buffer_words, step_shapes
from mnemosyne_jax.model.params import Params, weight_bytes_per_device
from mnemosyne_jax.model.step import INPUTS, make_readout, make_redraw, make_state, make_step
from mnemosyne_jax.packing import leaving_rows, pack, pack_draws, place_chunks, smallest_shape
from mnemosyne_jax.planning import ACTIVATION_FRACTION
from mnemosyne_jax.serve.batch import Batch
from mnemosyne_jax.serve.executor import StepResult

log = logging.getLogger("mnemosyne_jax")
READOUT_ROWS = 64
CPU_POOL_TOKENS, CPU_POOL_BYTES = 131_072, 2**31  # of each group, whichever is less


class JaxExecutor:
    """Executor over a mesh: submits ticks ahead of reading their tokens, and compiles a program when first met."""

    in_step = True

    def __init__(self, config: ModelConfig, params: Params, serve: ServeConfig, mesh: Mesh):
        self.config, self.params, self.serve, self.mesh = config, params, serve, mesh
        self.spec = spec_of(mesh)
        self.dtype = params.embed.dtype
        self.impl = choose_impl(serve, config, self.spec.tp, self.dtype)
        log.info("attention kernels: %s", self.impl)
        self.shapes = step_shapes(serve, self.spec)
        self._draw_rows = min(READOUT_ROWS, max(shape.sampled for shape in self.shapes) * self.spec.kvp)
        self.pool_pages = serve.pool_pages or _pages_that_fit(config, params, serve, mesh)
        self.target = cache.abstract(config, serve, mesh, self.dtype, self.pool_pages)
        self._on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._sharding, self._replicated = NamedSharding(mesh, partition(INPUTS)), NamedSharding(mesh, PartitionSpec())
        self._programs: dict[Any, Callable] = {}
        self._state: cache.State | None = None
        self._history = deque([Batch(-1)] * self.spec.spp, maxlen=self.spec.spp)
        self._unread: deque[tuple[Batch, StepShape, jax.Array, list, list]] = deque()
        self._start_s = time.monotonic()

    @property
    def depth(self) -> int:
        return self.spec.spp - 1 + self.serve.ahead

    def now(self) -> float:
        return time.monotonic() - self._start_s

    def wait_until(self, time_s: float) -> None:
        time.sleep(max(0.0, time_s - self.now()))

    def agree(self, events: Any) -> Any:
        if jax.process_count() == 1:
            return events
        return pickle.loads(broadcast(pickle.dumps(events)))

    def fits(self, shared_tokens: int, private_tokens: int) -> bool:
        """Whether some program holds chunk areas of these sizes."""
        return any(shape.holds(shared_tokens, private_tokens) for shape in self.shapes)

    # Programs.

    def warmup(self, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Builds every program and the state; returns how many programs there are. None is built after it."""
        keys = ["state", "readout", "redraw", *self.shapes]
        threads = 1 if self._on_cpu else min(8, len(keys))
        with ThreadPoolExecutor(threads) as pool:
            for done, _ in enumerate(pool.map(self._program, keys), start=1):
                progress(done, len(keys))
        self._allocated()
        return len(keys)

    def _program(self, key: Any) -> Callable:
        if key not in self._programs:
            begin_s = time.monotonic()
            self._programs[key] = self._build(key)
            log.info("compiled %s in %.1f s", key, time.monotonic() - begin_s)
        return self._programs[key]

    def _build(self, key: Any) -> Callable:
        if key == "state":
            return make_state(self.target).lower().compile()
        if key == "readout":
            rows = jax.ShapeDtypeStruct((READOUT_ROWS,), np.int32, sharding=self._replicated)
            return (
                make_readout(self.mesh, self.config, self.dtype).lower(self.params, self.target, rows, rows).compile()
            )
        if key == "redraw":
            draws = jax.ShapeDtypeStruct((8, self._draw_rows), np.int32, sharding=self._replicated)
            return make_redraw(self.mesh, self.config, self.dtype).lower(self.params, self.target, draws).compile()
        step = make_step(self.mesh, self.config, key, self.dtype, self.serve.rope_precision, self.impl)
        words = (self.spec.spp, self.spec.kvp, buffer_words(key))
        buffer = jax.ShapeDtypeStruct(words, np.int32, sharding=self._sharding)
        return step.lower(self.params, self.target, buffer).compile()

    def memory_analysis(self, shape: StepShape) -> Any:
        """XLA's account of a tick's memory per device: arguments, outputs, aliases and temporaries, in bytes."""
        return self._program(shape).memory_analysis()  # type: ignore[attr-defined]

    def _allocated(self) -> cache.State:
        state = self._state or self._program("state")()
        self._state = state
        return state

    # Ticks.

    def step(self, batch: Batch) -> StepResult | None:
        self._history.appendleft(batch)
        shape = smallest_shape(self.shapes, self._history, self.spec.kvp)
        program, state = self._program(shape), self._allocated()
        buffer = self._to_devices(pack(shape, self._history, self.spec.kvp), self._sharding)
        if self._on_cpu and self._unread:
            # Two collective programs in flight on virtual devices can take each other's threads and never meet.
            jax.block_until_ready(state.tokens)
        self._state, tokens = program(self.params, state, buffer)
        late = not self._on_cpu and bool(self._unread) and self._unread[-1][2].is_ready()  # type: ignore[attr-defined]
        tokens.copy_to_host_async()
        leaving = self._history[-1]
        drawn = self._draw(leaving, shape)
        self._unread.append((leaving, shape, tokens, drawn, self._read_logits(leaving, shape)))
        return replace(self._result(), late=late) if len(self._unread) > self.serve.ahead else None

    def _to_devices(self, x: np.ndarray, sharding: NamedSharding) -> jax.Array | np.ndarray:
        if jax.process_count() == 1:
            return x  # the call of a program sends it, in less than half the time of device_put
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def _beside(self, key: str, *inputs: np.ndarray) -> Any:
        """What a program gives of the state that the last tick left."""
        if self._on_cpu:
            jax.block_until_ready(self._state)
        result = self._program(key)(self.params, self._state, *(self._to_devices(x, self._replicated) for x in inputs))
        return jax.block_until_ready(result) if self._on_cpu else result

    def _draw(self, batch: Batch, shape: StepShape) -> list[tuple[list[tuple[int, int]], jax.Array]]:
        """Draws the tokens of rows that are not greedy: ([(group, place among the tick's tokens)], device array)."""
        if not any(row.request.temperature > 0 for row in (*batch.decodes, *batch.chunks)):
            return []
        hot, drawn = [row for row in leaving_rows(batch, shape) if row[0].request.temperature > 0], []
        for at in range(0, len(hot), self._draw_rows):
            part = hot[at : at + self._draw_rows]
            self._state, tokens = self._beside("redraw", pack_draws(part, shape, self._draw_rows))
            tokens.copy_to_host_async()
            drawn.append(([(row.group or 0, index) for row, index, _ in part], tokens))
        return drawn

    def _read_logits(self, batch: Batch, shape: StepShape) -> list[tuple[list[tuple[str | int, int]], jax.Array]]:
        """Starts reading the logits that the leaving batch's requests asked for: ([(id, position)], device array)."""
        wanted = []
        for row, _, offset in place_chunks(batch, shape):
            asked = row.request.read_positions
            first = shape.hidden_row(shape.slots + offset) - row.start
            for p in asked[bisect_left(asked, row.start) : bisect_left(asked, row.end)]:
                wanted.append(((row.request.id, p), first + p, row.group or 0))
        reads = []
        for at in range(0, len(wanted), READOUT_ROWS):
            part = wanted[at : at + READOUT_ROWS]
            rows, groups = np.zeros((2, READOUT_ROWS), np.int32)
            rows[: len(part)], groups[: len(part)] = [w[1] for w in part], [w[2] for w in part]
            logits = self._beside("readout", rows, groups)
            logits.copy_to_host_async()
            reads.append(([w[0] for w in part], logits))
        return reads

    def _result(self) -> StepResult:
        batch, shape, tokens, drawn, reads = self._unread.popleft()
        token_GX = np.asarray(tokens.addressable_data(0)).tolist()
        for places, values in drawn:
            for (group, index), value in zip(places, np.asarray(values.addressable_data(0)).tolist(), strict=False):
                token_GX[group][index] = value
        logits = {}
        for keys, values in reads:
            logits |= dict(zip(keys, np.asarray(values.addressable_data(0)), strict=False))
        return StepResult(
            batch,
            decode_tokens=tuple(token_GX[row.group or 0][row.slot] for row in batch.decodes),
            chunk_tokens=tuple(
                token_GX[row.group or 0][shape.slots + index] if row.last else 0
                for row, index, _ in place_chunks(batch, shape)
            ),
            logits=logits,
            time_s=self.now(),
        )


def _pages_that_fit(config: ModelConfig, params: Params, serve: ServeConfig, mesh: Mesh) -> int:
    """Pages per group that the devices have memory for beside the weights; on a CPU, a fixed amount."""
    spec, dtype = spec_of(mesh), params.embed.dtype
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        tokens = min(CPU_POOL_TOKENS, CPU_POOL_BYTES // config.kv_bytes_per_token(dtype.itemsize, spec.tp))
        return max(1, tokens // serve.page_tokens)
    one, two = (cache.state_bytes_per_device(cache.abstract(config, serve, mesh, dtype, pages)) for pages in (1, 2))
    stats = device.memory_stats() or {}
    room = int(stats.get("bytes_limit", 0) * (1 - ACTIVATION_FRACTION)) - weight_bytes_per_device(params) - one
    pages = 1 + room // (two - one)
    if pages < 1:
        raise RequestError("mesh", str(spec), f"leaves no memory for pages on {device.device_kind}")
    return int(pages)
