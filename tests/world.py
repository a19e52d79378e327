"""A Loop over a FakeExecutor, with every invariant of the control plane checked at every tick."""

from dataclasses import fields, replace

import numpy as np

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ServeConfig, from_yaml
from mnemosyne_jax.model.inputs import step_shapes
from mnemosyne_jax.packing import pack, smallest_shape
from mnemosyne_jax.serve.engine import Loop
from mnemosyne_jax.serve.request import Phase, Request
from mnemosyne_jax.serve.scheduler import Scheduler
from tests.fake_executor import VOCAB, FakeExecutor, answer

SMALL = {"page_tokens": 4, "chunk_tokens": 16, "private_rows": 3, "private_chunks": 2, "span_tokens": 32}


def guessed(name: str) -> HardwareConfig:
    """The hardware of a file with the shares it had before any calibration, so that no test hangs on one."""
    known, guess = from_yaml(HardwareConfig, f"configs/hardware/{name}.yaml"), HardwareConfig()
    coefficients = [f.name for f in fields(guess) if f.name.endswith(("_share", "_overhead_s", "_rows", "_dims"))]
    return replace(known, **{name: getattr(guess, name) for name in coefficients}, fitted=False)


class World:
    """A Loop over a FakeExecutor, with everything checked at every tick."""

    def __init__(self, kvp=1, spp=1, pool_pages=16, **serve):
        self.serve, self.mesh = ServeConfig(**(SMALL | serve)), MeshSpec(kvp=kvp, spp=spp)
        self.shapes = step_shapes(self.serve, self.mesh)
        self.executor = FakeExecutor(self.serve, self.mesh, pool_pages)
        fits = lambda shared, private: any(shape.holds(shared, private) for shape in self.shapes)  # noqa: E731
        self.scheduler = Scheduler(self.serve, self.mesh, pool_pages=pool_pages, vocab=VOCAB, fits=fits)
        self.loop = Loop(self.scheduler, self.executor, keep_batches=True)

    def submit(self, id, prompt_tokens, max_new_tokens, stop_ids=()):
        return self.scheduler.submit(ask(id, prompt_tokens, max_new_tokens, stop_ids), self.executor.now())

    def tick(self, count=1, arrivals=(), cancels=()):
        for _ in range(count):
            before = len(self.loop.batches)
            self.loop.tick(list(arrivals), list(cancels))
            self.check_nothing_lost()
            if len(self.loop.batches) > before:
                self.check_batch(self.loop.batches[-1])

    def run(self, most=2000):
        """Ticks until nothing is left to do."""
        ticks = 0
        while not self.loop.idle:
            self.tick()
            ticks += 1
            assert ticks <= most, "no end in sight"
        assert all(pool.free == pool.size for pool in self.scheduler.places.pools)
        return ticks

    def check_nothing_lost(self):
        """Of each group's pages and slots: free, in quarantine and owned are disjoint and together all."""
        s, shared = self.scheduler, self.serve.shared_slots(self.mesh)
        running = [q for q in s.sequences.values() if q.phase is not Phase.WAITING]
        for g, pool in enumerate(s.places.pools):
            pages = pool._free[: pool._free_count].tolist() + [p for of, p in self.quarantined_pages() if of == g]
            pages += [p for q in running for span in q.spans if span.group == g for p in span.pages.tolist()]
            assert sorted(pages) == list(range(pool.size))
        for group in (None, *range(self.mesh.kvp)):
            slots = s.places.free_slots[group] + [slot for _, of, slot in s.places.quarantined_slots if of == group]
            slots += [q.slot for q in running if q.group == group]
            assert sorted(slots) == list(range(shared) if group is None else range(shared, self.serve.slots(self.mesh)))

    def check_batch(self, batch):
        """Budget and row counts hold in every group, and a compiled program takes the whole pipe."""
        for g in range(self.mesh.kvp):
            assert batch.chunk_tokens(None) + batch.chunk_tokens(g) <= self.serve.chunk_tokens
            assert sum(row.group == g for row in batch.chunks) <= self.serve.private_chunks
        assert sum(row.group is None for row in batch.chunks) <= self.serve.shared_chunks
        shape = smallest_shape(self.shapes, self.executor.history, self.mesh.kvp)
        assert pack(shape, self.executor.history, self.mesh.kvp).shape[:2] == (self.mesh.spp, self.mesh.kvp)

    @property
    def held(self):
        """Pages owned by a request, over all groups."""
        return sum(pool.size - pool.free - pool.quarantined for pool in self.scheduler.places.pools)

    def quarantined_pages(self):
        """(group, page) of every page in quarantine."""
        pools = enumerate(self.scheduler.places.pools)
        return [(g, p) for g, pool in pools for _, pages in pool._quarantine for p in pages.tolist()]


def ask(id, prompt_tokens, max_new_tokens, stop_ids=()):
    return Request(id, np.arange(prompt_tokens) % VOCAB, max_new_tokens, stop_ids=stop_ids)


def check_answers(sequences):
    for s in sequences:
        assert s.finished and s.tokens == answer(s.request), s.request.id


def pages_of(sequence):
    """(group, page) of every page that a sequence was given."""
    return [(span.group, p) for span in sequence.spans for p in span.pages.tolist()]
