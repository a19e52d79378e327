"""Random submissions, deadlines and cancels under time budgets and every policy, each tick checked as in world.py.

200 sequences of operations by default; the long run: MNEMOSYNE_SEQUENCES=10000 pytest tests/test_timed_operations.py
"""

import logging
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from mnemosyne_jax.config import HardwareConfig, ModelConfig
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.planning import tick_time, times_alone
from mnemosyne_jax.serve.budget import BatchLoad
from mnemosyne_jax.serve.chunking import STEP
from mnemosyne_jax.serve.engine import Loop
from mnemosyne_jax.serve.request import Request
from mnemosyne_jax.serve.scheduler import Scheduler
from tests.fake_executor import VOCAB, answer, token_at
from tests.world import World, ask, pages_of

SEQUENCES = int(os.environ.get("MNEMOSYNE_SEQUENCES", 200))
ASKED = st.fixed_dictionaries(
    {
        "share": st.floats(0, 1).map(lambda x: x**3),  # of the longest prompt: most are short
        "new": st.integers(1, 12),
        "stop": st.integers(0, 30),
        "bad": st.integers(0, 30),
        "deadline_s": st.sampled_from([None, 0.01, 0.5, 30.0, 1e4]),
    }
)
MODEL = ModelConfig(width=64, ffn=128, vocab=VOCAB, layers=12, heads=4, kv_heads=2, head_dim=16)
# A program of one stage takes 2 ms and 30 us a row, 128 queries over 1,000 keys another 13 ms: budgets of some
# milliseconds hold chunks of some lengths and not others.
HARDWARE = HardwareConfig(matmul_flops_per_s=4e10, hbm_bytes_per_s=1e10, layer_overhead_s=0.0, tick_overhead_s=2e-3)
NEVER_S, SOME_S, ALWAYS_S = 1e-4, (5e-3, 10e-3, 25e-3), 10.0  # budgets by what fits into them
SLOP = 1 + 1e-9


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, "mnemosyne_jax")  # decodes that are too many are said to be, once a run


class TimedWorld(World):
    """A World whose scheduler has a time budget, which every batch must keep, or a forced chunk must be counted."""

    def __init__(self, kvp, spp, pool_pages, tick_s, **serve):
        super().__init__(kvp, spp, pool_pages, **serve)
        self.executor.tick_s = tick_s
        self.time = tick_time(MODEL, HARDWARE, self.mesh, self.serve)
        self.scheduler = Scheduler(
            self.serve,
            self.mesh,
            pool_pages=pool_pages,
            vocab=VOCAB,
            fits=lambda *tokens: self.time.program_rows(*tokens) is not None,
            tick_time=self.time,
            prefill_times=times_alone(self.time, self.serve, pool_pages * self.serve.page_tokens * kvp),
        )
        self.loop = Loop(self.scheduler, self.executor, keep_batches=True)
        self.schedule, self.scheduler.next_batch = self.scheduler.next_batch, self.next_batch

    def next_batch(self, now_s):
        """What the scheduler decides, once it is seen to be in time."""
        forced = self.scheduler.filling.forced_chunks
        batch = self.schedule(now_s)
        ending = {id(row.request) for row in batch.chunks if row.last}
        decoding = any(s.tokens_scheduled and id(s.request) not in ending for s in self.scheduler.sequences.values())
        budget_s = self.serve.tbt_slo_s / self.mesh.spp if decoding else self.serve.idle_tick_s
        budget_s /= self.scheduler.pace.ratio  # the clock of the executor knows nothing of loads
        older = list(self.executor.history)[: self.mesh.spp - 1]
        seconds = self.time.seconds(tuple(self.load(one) for one in (batch, *older)))
        forced = self.scheduler.filling.forced_chunks - forced
        if not forced:
            assert not batch.chunks or seconds <= budget_s * SLOP, "chunks made a tick too long"
        else:  # one, the smallest there is, in place of chunks that fit
            (row,) = batch.chunks
            assert forced == 1 and row.length <= STEP
            assert seconds * SLOP > budget_s, "a forced chunk would have fitted"
        for g in range(self.mesh.kvp):
            of_group = [row for row in batch.chunks if g in {span.group for span in row.spans}]
            assert sum(len(row.request.prompt) > self.serve.span_tokens for row in of_group) <= 1
        return batch

    def load(self, batch):
        load = self.time.with_decodes(BatchLoad.empty(self.mesh.kvp), batch.decodes)
        for row in batch.chunks:
            load = self.time.with_chunk(load, row.spans, row.group is None, row.start, row.length)
        return load


class TimedOperations(RuleBasedStateMachine):
    """Random submissions, ticks and cancels in a pool just big enough; every request ends, as if it were alone."""

    @initialize(
        kvp=st.integers(1, 4),
        spp=st.integers(1, 4),
        pages=st.integers(2, 16),
        tick_s=st.sampled_from([0.005, 0.1, 1.0]),
        serve=st.fixed_dictionaries(
            {
                "policy": st.sampled_from(["fcfs", "fcfs_exclusive", "edf", "srpt", "lars"]),
                "late": st.sampled_from(["serve", "demote", "refuse"]),
                "tbt_slo_s": st.sampled_from([NEVER_S, *SOME_S, ALWAYS_S]),
                "idle_tick_s": st.sampled_from([NEVER_S, *SOME_S, ALWAYS_S]),
                "long_yield": st.sampled_from([0.0, 0.4]),
                "least_chunk_every": st.integers(1, 5),
                "placement": st.sampled_from(["grow", "stripe"]),
                "ahead": st.integers(1, 2),
                "page_tokens": st.just(16),
                "private_rows": st.integers(1, 4),
                "private_chunks": st.integers(1, 3),
                "shared_rows": st.integers(1, 2),
                "shared_chunks": st.integers(1, 2),
                "span_tokens": st.sampled_from([16, 64, 256]),
                "chunk_tokens": st.sampled_from([16, 32, 50, 64, 128]),
                "chunk_buckets": st.sampled_from([(128,), (32, 128), (16, 40, 64, 128, 160)]),
            }
        ),
    )
    def start(self, kvp, spp, pages, tick_s, serve):
        self.world = TimedWorld(kvp, spp, pages, tick_s, **serve)
        self.sequences, self.arrivals, self.poisoned = [], [], []

    @rule(which=st.integers(0, 5), asked=st.lists(ASKED, min_size=1, max_size=4))
    def submit(self, which, asked):
        for i, one in enumerate(asked):
            self.submit_one(f"r{(which + i) % 6}", **one)

    def submit_one(self, id, share, new, stop, bad, deadline_s):
        """Ids are few, so they come again, also while late rows of their last owner are in the pipe."""
        world = self.world
        prompt = max(1, int(share * (world.scheduler.longest + 1 - new)))
        stop_ids = (token_at(id, prompt - 1 + stop),) if stop < new else ()
        if id in world.scheduler.sequences or id in {r.id for r in self.arrivals}:
            return
        asked = ask(id, prompt, new, stop_ids)
        asked = Request(id, asked.prompt, new, deadline_s=deadline_s, stop_ids=stop_ids)
        try:
            request = world.scheduler.check(asked, world.executor.now())
        except RequestError as refusal:
            assert refusal.field == "deadline_s" and world.serve.late == "refuse"
            return
        world.executor.poisoned.pop(id, None)
        if bad < 3:
            world.executor.poisoned[id] = prompt - 1 + bad
            self.poisoned.append(request)
        self.arrivals.append(request)

    @rule(which=st.integers(0, 5))
    def cancel(self, which):
        """Between ticks: no page of it is held any longer."""
        sequence, held = self.world.scheduler.sequences.get(f"r{which}"), self.world.held
        assert self.world.scheduler.cancel(f"r{which}") == (sequence is not None)
        if sequence is not None:
            assert self.world.held == held - len(pages_of(sequence))
        self.world.check_nothing_lost()

    @rule(count=st.integers(1, 5), cancel=st.integers(0, 20))
    def tick(self, count, cancel):
        arrivals, self.arrivals = self.arrivals, []
        arrived, _ = self.world.loop.tick(arrivals, [f"r{cancel}"])
        self.sequences += arrived
        self.world.check_nothing_lost()
        self.world.tick(count - 1)

    def teardown(self):
        if not hasattr(self, "world"):
            return
        longest = ask("needs every page", self.world.scheduler.longest, 1)
        self.arrivals.append(self.world.scheduler.check(longest, self.world.executor.now()))
        self.tick(1, cancel=99)
        self.world.run()
        for s in self.sequences:
            full, ended = answer(s.request), s.reason.partition(":")[0]
            assert s.finished and ended in ("length", "stop", "cancelled", "error", "refused"), s.request.id
            assert s.tokens == (full if ended in ("length", "stop") else full[: len(s.tokens)])
            if ended == "refused":
                assert self.world.serve.late == "refuse" and s.request.deadline_s is not None and not s.tokens
            if ended == "error":
                assert any(s.request is request for request in self.poisoned)


TestTimedOperations = TimedOperations.TestCase
TestTimedOperations.settings = settings(max_examples=SEQUENCES, stateful_step_count=25, deadline=None, derandomize=True)
