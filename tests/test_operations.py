"""Random submissions, ticks and cancels on meshes of all kinds, each step checked as in world.py.

200 sequences of operations by default; for the long run: MNEMOSYNE_SEQUENCES=10000 pytest tests/test_operations.py
"""

import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.fake_executor import answer, token_at
from tests.world import World, ask, pages_of

SEQUENCES = int(os.environ.get("MNEMOSYNE_SEQUENCES", 200))
FEW = st.integers(0, 20)


class Operations(RuleBasedStateMachine):
    """Random submissions, ticks and cancels in a pool just big enough; every answer as if its request were alone."""

    @initialize(
        kvp=st.integers(1, 4),
        spp=st.integers(1, 4),
        pages=st.integers(1, 8),
        serve=st.fixed_dictionaries(
            {
                "placement": st.sampled_from(["grow", "stripe"]),
                "ahead": st.integers(1, 2),
                "private_rows": st.integers(1, 3),
                "private_chunks": st.integers(1, 3),
                "shared_rows": st.integers(1, 2),
                "shared_chunks": st.integers(1, 2),
                "span_tokens": st.sampled_from([4, 8, 16, 64]),
                "chunk_tokens": st.sampled_from([3, 8, 16]),
                "chunk_buckets": st.sampled_from([None, (16,), (4, 16), (1, 2, 5, 17)]),
                "max_waiting": st.sampled_from([3, 100]),
            }
        ),
    )
    def start(self, kvp, spp, pages, serve):
        self.world = World(kvp, spp, pages, **serve)
        self.sequences, self.arrivals = [], []

    @rule(which=st.integers(0, 3), share=st.floats(0, 1), new=st.integers(1, 6), stop=st.integers(0, 9), bad=FEW)
    def submit(self, which, share, new, stop, bad):
        """Ids are few, so they come again, also while late rows of their last owner are in the pipe."""
        id, world = f"r{which}", self.world
        prompt = max(1, int(share * (world.scheduler.longest + 1 - new)))
        stop_ids = (token_at(id, prompt - 1 + stop),) if stop < new else ()
        taken = id in world.scheduler.sequences or id in {r.id for r in self.arrivals}
        if taken or prompt + new > world.scheduler.longest + 1:
            return
        world.executor.poisoned.pop(id, None)
        if bad < 3:
            world.executor.poisoned[id] = prompt - 1 + bad
        self.arrivals.append(world.scheduler.check(ask(id, prompt, new, stop_ids), world.executor.now()))

    @rule(which=st.integers(0, 3))
    def cancel(self, which):
        """Between ticks: no page of it is held any longer."""
        sequence, held = self.world.scheduler.sequences.get(f"r{which}"), self.world.held
        assert self.world.scheduler.cancel(f"r{which}") == (sequence is not None)
        if sequence is not None:
            assert self.world.held == held - len(pages_of(sequence))
        self.world.check_nothing_lost()

    @rule(count=st.integers(1, 8), cancel=st.integers(0, 12))
    def tick(self, count, cancel):
        arrivals, self.arrivals = self.arrivals, []
        self.world.tick(1, arrivals, [f"r{cancel}"])
        ours = {id(r) for r in arrivals}
        self.sequences += [s for s in self.world.scheduler.sequences.values() if id(s.request) in ours]
        self.world.tick(count - 1)

    def teardown(self):
        if not hasattr(self, "world"):
            return
        self.tick(1, cancel=99)
        self.world.run()
        for s in self.sequences:
            full, bad = answer(s.request), s.reason.startswith("error")
            assert s.tokens == (full[: len(s.tokens)] if bad or s.reason == "cancelled" else full)
            assert s.finished and s.reason in ("length", "stop", "cancelled") or bad


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=SEQUENCES, stateful_step_count=25, deadline=None, derandomize=True)
