"""What the host spends on a tick: microseconds of `next_batch` and of `pack`, with no device.

`python -m experiments.bench_packing` schedules and packs 64 decode rows and one chunk of a long prompt in every tick,
at each of `contexts` and on each mesh of MESHES. `--out FILE` writes the record, `--check true` prints every must.
The time must not grow with the context: a tick sends what is new, never a page table.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from experiments import command_line, results
from mnemosyne_jax.config import MeshSpec, ServeConfig
from mnemosyne_jax.model.inputs import step_shapes
from mnemosyne_jax.packing import pack, smallest_shape
from mnemosyne_jax.serve.batch import Batch
from mnemosyne_jax.serve.executor import StepResult
from mnemosyne_jax.serve.request import Phase, Request
from mnemosyne_jax.serve.scheduler import Scheduler

MESHES = (MeshSpec(), MeshSpec(kvp=2, spp=2), MeshSpec(spp=4))
SPAN_TOKENS = 8192


@dataclass(frozen=True)
class BenchPackingConfig:
    """`decodes` rows in each tick (so spp times as many requests), `context` tokens each, beside one chunk of `chunk`.

    With several groups, requests longer than 8192 tokens are shared by all of them, shorter ones private to one.
    """

    decodes: int = 64
    contexts: tuple[int, ...] = (1_024, 1_048_576)
    chunk: int = 512
    page_tokens: int = 128
    ticks: int = 400
    must_us: float = 1000.0
    out: str | None = None
    check: bool = False


def decoding(config: BenchPackingConfig, mesh: MeshSpec, context: int) -> Scheduler:
    """A scheduler in the midst of its work: every request but the last has its prompt behind it."""
    requests, ticks = config.decodes * mesh.spp, config.ticks + 4 * mesh.spp
    shared = mesh.kvp > 1 and context > SPAN_TOKENS
    serve = ServeConfig(
        page_tokens=config.page_tokens,
        private_rows=1 if shared else 1 + -(-requests // mesh.kvp),
        shared_rows=requests + 1 if shared else 1,
        chunk_tokens=config.chunk,
        span_tokens=SPAN_TOKENS,
    )
    prompt = np.zeros(max(context, config.chunk * ticks), np.int32)
    pages = requests * -(-(context + ticks) // config.page_tokens) + len(prompt) // config.page_tokens + 2
    shapes = step_shapes(serve, mesh)
    fits = lambda shared, private: any(shape.holds(shared, private) for shape in shapes)  # noqa: E731
    scheduler = Scheduler(serve, mesh, pool_pages=pages, vocab=1, fits=fits)
    for i in range(requests):
        sequence = scheduler.enqueue(Request(f"decode {i}", prompt[:context], ticks, arrival_s=0.0, stop_ids=()))
        sequence.prompt_scheduled, sequence.tokens_scheduled, sequence.last_tick = context, 1, i % mesh.spp - mesh.spp
    scheduler.enqueue(Request("prompt", prompt[: config.chunk * ticks], 1, arrival_s=0.0, stop_ids=()))
    scheduler._admit(0.0)
    assert scheduler.waiting == 0
    *decoding, _ = scheduler.sequences.values()
    for sequence in decoding:
        scheduler._prefilling.remove(sequence)
        scheduler._decoding.append(sequence)
        sequence.phase = Phase.DECODE
    return scheduler


def measure(config: BenchPackingConfig, mesh: MeshSpec, context: int) -> tuple[np.ndarray, int]:
    """(microseconds [tick, (next_batch, pack)] with the pipe full, bytes that a tick sends to all devices)."""
    scheduler = decoding(config, mesh, context)
    shapes, history = step_shapes(scheduler.serve, mesh), deque([Batch(-1)] * mesh.spp, maxlen=mesh.spp)
    took_s, sent_bytes = [], 0
    for tick in range(config.ticks + 2 * mesh.spp):
        begin_s = time.perf_counter()
        batch = scheduler.next_batch(0.0)
        scheduled_s = time.perf_counter()
        history.appendleft(batch)
        sent_bytes = pack(smallest_shape(shapes, history, mesh.kvp), history, mesh.kvp).nbytes
        packed_s = time.perf_counter()
        assert len(batch.decodes) == config.decodes and [row.length for row in batch.chunks] == [config.chunk]
        if tick >= 2 * mesh.spp:
            took_s.append((scheduled_s - begin_s, packed_s - scheduled_s))
        if not history[-1].empty:
            leaving = history[-1]
            scheduler.commit(StepResult(leaving, (0,) * len(leaving.decodes), (0,) * len(leaving.chunks), {}, 0.0))
    return 1e6 * np.array(took_s), sent_bytes


def main(args: list[str] | None = None) -> int:
    config = command_line.read(BenchPackingConfig, args)
    rows = []
    for mesh in MESHES:
        for context in config.contexts:
            took_us, sent_bytes = measure(config, mesh, context)
            where = {"context": context, "chunk": config.chunk, "mesh": str(mesh)}
            total_us = took_us.sum(1)
            for name, parts_us in (("next_batch", took_us[:, 0]), ("pack", took_us[:, 1]), ("host", total_us)):
                must = f"<= {config.must_us:g}" if name == "host" else None
                rows.append(results.row(f"{name} p50", round(float(np.median(parts_us)), 1), "us", must=must, **where))
                rows.append(results.row(f"{name} p99", round(float(np.percentile(parts_us, 99)), 1), "us", **where))
            rows.append(results.row("sent to devices", sent_bytes, "bytes", **where))
            words = [f"{r['name']} {r['value']:g} {r['unit']}" for r in rows[-7:]]
            print(f"{mesh}, {context} tokens: {', '.join(words)}", flush=True)
    made = results.document(config, rows)
    if config.out:
        results.write(config.out, made)
    return 0 if not config.check or results.check(made) else 1


if __name__ == "__main__":
    sys.exit(main())
