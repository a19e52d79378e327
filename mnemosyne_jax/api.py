"""The surface for scripts and notebooks: Engine, its handles and results."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mnemosyne_jax import checkpoint, needle, snapshot
from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, ServeConfig
from mnemosyne_jax.errors import GenerationError, RequestError
from mnemosyne_jax.mesh import make_mesh, spec_of
from mnemosyne_jax.model.attention import refuse_impl
from mnemosyne_jax.model.params import Params
from mnemosyne_jax.planning import hardware_of, tick_time, times_alone
from mnemosyne_jax.runtime import JaxExecutor
from mnemosyne_jax.serve.chunking import ChooseChunk, largest_chunk
from mnemosyne_jax.serve.engine import Loop
from mnemosyne_jax.serve.request import Request, Sequence, Timeline
from mnemosyne_jax.serve.scheduler import Scheduler

log = logging.getLogger("mnemosyne_jax")


@dataclass(frozen=True)
class Progress:
    """How far a prefill is: tokens of the prompt in all and processed, seconds since arrival and still to go.

    `eta_s` assumes the mean pace since admission; NaN before the first chunk came back.
    """

    total: int
    processed: int
    elapsed_s: float
    eta_s: float


@dataclass(frozen=True)
class Result:
    """An answer: token ids without the prompt, when they came, why it ended (length, stop, cancelled, error: ...)."""

    tokens: list[int]
    timeline: Timeline
    reason: str

    @property
    def error(self) -> str | None:
        return self.reason if self.reason.startswith("error") else None


class Handle:
    """A submitted request. Iterate it for its tokens as they come; iterating is what drives the engine."""

    def __init__(self, engine: Engine, request: Request):
        self._engine, self.request = engine, request
        self._sequence = Sequence(request, Timeline(arrival_s=request.arrival_s or 0.0))

    @property
    def tokens(self) -> list[int]:
        """Token ids so far."""
        return list(self._sequence.tokens)

    @property
    def timeline(self) -> Timeline:
        return self._sequence.timeline

    @property
    def finished(self) -> bool:
        return self._sequence.finished

    @property
    def reason(self) -> str:
        """Why it ended: length, stop, cancelled, or "error: ..."; empty while it has not."""
        return self._sequence.reason

    def progress(self) -> Progress:
        """How far the prefill is."""
        s, now_s = self._sequence, self._engine.now()
        total, begin_s = len(self.request.prompt), s.timeline.admitted_s
        done_s = s.timeline.token_s[0] if s.timeline.token_s else now_s
        eta_s = float("nan")
        if begin_s is not None and s.prompt_done:
            eta_s = (done_s - begin_s) * (total / s.prompt_done - 1)
        return Progress(total, s.prompt_done, done_s - s.timeline.arrival_s, eta_s)

    def cancel(self) -> None:
        """Ends the request at the next tick, in whatever phase it is; its pages come back. Does nothing if finished."""
        if not self.finished:
            self._engine._cancel(self.request.id)

    def result(self) -> Result:
        """Runs the engine until this request has ended."""
        while not self.finished:
            self._engine.tick()
        return Result(self.tokens, self.timeline, self.reason)

    def __iter__(self) -> Iterator[int]:
        """Tokens as they come.

        Raises: GenerationError if the request fails while it runs.
        """
        sent = 0
        while True:
            while sent < len(self._sequence.tokens):
                sent += 1
                yield self._sequence.tokens[sent - 1]
            if self.finished:
                if self.reason.startswith("error"):
                    raise GenerationError(f"request {self.request.id}: {self.reason}")
                return
            self._engine.tick()


class Engine:
    """A model on a mesh, serving requests. One thread drives it, through `tick`, handles, `generate` or `logits`."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Any,
        serve: ServeConfig = ServeConfig(),
        choose_chunk: ChooseChunk = largest_chunk,
        hardware: HardwareConfig | None = None,
    ):
        """`hardware` predicts ticks (None: by the kind of the mesh's devices); `choose_chunk` is for `fixed` chunks."""
        self.config, self.params, self.mesh, self.serve = config, params, mesh, serve
        self.hardware = hardware or hardware_of(mesh.devices.flat[0].device_kind)
        known = "calibrated" if self.hardware.fitted else "not calibrated"
        log.info("ticks are predicted for %s, %s", self.hardware.name, known)
        self.executor = JaxExecutor(config, params, serve, mesh)
        spec, pool_pages = spec_of(mesh), self.executor.pool_pages
        served = dataclasses.replace(config, dtype=self.executor.dtype.name)
        ticks = tick_time(served, self.hardware, spec, serve)
        self.scheduler = Scheduler(
            serve,
            spec,
            pool_pages=pool_pages,
            vocab=config.vocab,
            fits=self.executor.fits,
            choose_chunk=choose_chunk,
            tick_time=ticks if serve.chunking == "adaptive" else None,
            prefill_times=times_alone(ticks, serve, pool_pages * serve.page_tokens * spec.kvp),
        )
        self.loop = Loop(self.scheduler, self.executor)
        self._handles: dict[str | int, Handle] = {}
        self._arrivals: list[Request] = []
        self._cancels: list[str | int] = []
        self._count = 0

    @classmethod
    def load(
        cls,
        path: str | Path,
        mesh: MeshSpec = MeshSpec(),
        serve: ServeConfig = ServeConfig(),
        dtype: str | None = None,
        hardware: HardwareConfig | None = None,
    ) -> Engine:
        """An Engine over a local Hugging Face folder of safetensors, or a folder that `save` wrote.

        It compiles nothing yet; see `warmup`. `dtype` None keeps the checkpoint's. Raises:
        RequestError for a checkpoint, mesh or setting that cannot be served, before a device is touched.
        """
        refuse_impl(serve.impl)
        wanted = None if dtype is None else jnp.dtype(dtype)
        if (Path(path) / snapshot.FACTS).is_file():
            config, params = snapshot.restore(path, device_mesh := make_mesh(mesh), wanted)
        else:
            checkpoint.read_config(path).refuse_mesh(mesh)
            config, params = checkpoint.load(path, device_mesh := make_mesh(mesh), wanted)
        return cls(config, params, device_mesh, serve, hardware=hardware)

    def save(self, path: str | Path) -> None:
        """Writes the weights with orbax in one layout that `load` restores onto any mesh."""
        snapshot.save(path, self.params, self.config)

    @classmethod
    def needle(
        cls,
        mesh: MeshSpec = MeshSpec(),
        serve: ServeConfig = ServeConfig(),
        dtype: str = "float32",
        hardware: HardwareConfig | None = None,
    ) -> Engine:
        """An Engine over the embedded retrieval model; `needle_prompt` makes prompts for it."""
        refuse_impl(serve.impl)
        config, tensors = needle.config(), needle.tensors()
        config.refuse_mesh(mesh)
        device_mesh = make_mesh(mesh)
        params = checkpoint.place(config, device_mesh, jnp.dtype(dtype), lambda name, index: tensors[name][index])
        return cls(config, params, device_mesh, serve, hardware=hardware)

    def warmup(self, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Compiles every program this engine can need and allocates its memory; returns the number of programs.

        `progress(done, total)` is called after each. No program is compiled after it.
        """
        return self.executor.warmup(progress)

    def now(self) -> float:
        """Seconds on the engine's clock, which starts at 0 when it is made."""
        return self.executor.now()

    def submit(self, request: Request) -> Handle:
        """A Handle for a request that is queued for the next tick.

        Raises: RequestError with field, value and limit; the engine serves on as if nothing was asked.
        """
        request = self.scheduler.check(request, self.now(), self.config.stop_ids)
        if request.id in self._handles:
            raise RequestError("id", request.id, "is already queued or running")
        self.scheduler.check_queue(self._arrivals)
        handle = self._handles[request.id] = Handle(self, request)
        self._arrivals.append(request)
        return handle

    def wait(self) -> None:
        """Sleeps as long as the mesh is busy with the ticks it has, but for the time that it takes to decide the next.

        For servers, before they submit what has arrived: it takes part in the next tick, not in the one behind that.
        Returns at once where ticks are short or nothing is known of them (`chunking: fixed`).
        `gc.freeze()` after `warmup` keeps Python from looking through all there is by then, for longer than a tick.
        """
        self.loop.wait()

    def tick(self) -> None:
        """Runs one tick of the mesh: takes in what was submitted and cancelled, schedules, steps, commits."""
        arrivals, self._arrivals = self._arrivals, []
        cancels, self._cancels = self._cancels, []
        arrived, _ = self.loop.tick(arrivals, cancels)
        for sequence in arrived:
            if sequence.request.id in self._handles:
                self._handles[sequence.request.id]._sequence = sequence
        self._handles = {id: h for id, h in self._handles.items() if not h.finished}

    def _cancel(self, id: str | int) -> None:
        self._cancels.append(id)

    def generate(
        self,
        prompts: Seq[Seq[int] | np.ndarray],
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: tuple[int, ...] | None = None,
    ) -> list[Result]:
        """One Result for each prompt, in order; they are served together.

        An answer ends after `max_new_tokens` or with one of `stop_ids` (None: the checkpoint's
        end-of-sequence ids; () never stops). Raises: RequestError if any prompt is refused, before any is started.
        """
        requests = [
            Request(self._new_id(), prompt, max_new_tokens, None, None, temperature, top_p, seed, stop_ids)
            for prompt in prompts
        ]
        for index, request in enumerate(requests):
            try:
                self.scheduler.check(request, self.now(), self.config.stop_ids)
            except RequestError as error:
                raise RequestError(error.field, error.value, f"{error.limit} (prompts[{index}])") from None
        return [handle.result() for handle in self._submitted(requests)]

    def logits(self, token_ids: Seq[int] | np.ndarray, positions: Seq[int] | None = None) -> np.ndarray:
        """Teacher-forced logits, float32 [len(positions), vocab], through the same chunked, paged, sharded path.

        Row i is what the model says follows token_ids[:positions[i] + 1]. `positions` None means all.
        Raises: RequestError as `submit` does.
        """
        asked = range(np.size(token_ids)) if positions is None else positions
        handle = self.submit(Request(self._new_id(), token_ids, 1, stop_ids=(), read_positions=asked))
        handle.result()
        rows = handle._sequence.logits
        return np.stack([rows[int(p)] for p in asked]) if len(asked) else np.zeros((0, self.config.vocab), np.float32)

    def _queue_has_room(self) -> bool:
        try:
            self.scheduler.check_queue(self._arrivals)
        except RequestError:
            return False
        return True

    def _new_id(self) -> str:
        self._count += 1
        return f"#{self._count}"

    def _submitted(self, requests: list[Request]) -> list[Handle]:
        """Handles of all requests, submitted as the queue has room. If interrupted, none is left running."""
        handles: list[Handle] = []
        try:
            for request in requests:
                while not self._queue_has_room():
                    self.tick()
                handles.append(self.submit(request))
            while not all(handle.finished for handle in handles):
                self.tick()
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles
