"""Pages and slots change owners while older ticks are in the pipe; tokens stay as alone."""

import numpy as np
import pytest

import mnemosyne_jax as mn
from tests.engines import engine


@pytest.mark.parametrize(
    ("family", "kvp", "spp"), [("llama3", 1, 1), ("llama3", 1, 2), ("llama", 1, 3), ("llama3", 1, 4), ("llama3", 2, 2)]
)
def test_random_ends_and_cancels_in_a_pool_just_big_enough(family, kvp, spp):
    """Random stop ids, cancels and arrivals, submitted two ahead, where every grant needs somebody's old pages."""
    rng = np.random.default_rng(spp)
    tight = engine(family, kvp=kvp, spp=spp, ahead=2, pool_pages=12, private_rows=2)
    alone = engine(family)
    asked, handles = {}, {}
    for n in range(24):
        longest = 170 if kvp == 1 else 150  # with two groups, some are spread over both
        prompt = rng.integers(0, 211, int(rng.integers(1, longest)), dtype=np.int32)
        new = int(rng.integers(1, 12))
        (whole,) = alone.generate([prompt], max_new_tokens=new, stop_ids=())
        stop = tuple(rng.choice(whole.tokens, 1).tolist()) if n % 3 == 0 else ()
        asked[f"r{n}"] = (mn.Request(f"r{n}", prompt, new, stop_ids=stop), whole.tokens)
    waiting = list(asked)
    while waiting or not tight.loop.idle or tight._arrivals:
        for _ in range(int(rng.integers(0, 3))):
            if waiting:
                handles[waiting[0]] = tight.submit(asked[waiting[0]][0])
                waiting.pop(0)
        running = [h for h in handles.values() if not h.finished]
        if running and rng.random() < 0.08:
            running[int(rng.integers(len(running)))].cancel()
        tight.tick()
    reasons = {h.reason for h in handles.values()}
    assert reasons == {"length", "stop", "cancelled"}
    for id, handle in handles.items():
        request, whole = asked[id]
        stop = [whole.index(t) + 1 for t in request.stop_ids]
        want = whole[: stop[0]] if stop else whole
        assert handle.tokens == (want if handle.reason != "cancelled" else want[: len(handle.tokens)]), id
    for pool in tight.scheduler.places.pools:
        assert pool.free + pool.quarantined == pool.size == 12
