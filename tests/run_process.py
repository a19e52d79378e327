"""One process of a run of several: `python -m tests.run_process COORDINATOR PROCESSES INDEX FOLDER`.

Generates with a cancel in the middle and prints what came of it as JSON. Process 1's clock is 1,000 s
ahead and it asks for no cancel: only what process 0 says counts.
"""

import json
import sys

import numpy as np

import mnemosyne_jax as mn
from tests.engines import SMALL


def work(engine: mn.Engine, decides: bool = True) -> dict:
    """Tokens of requests that were cancelled, decoded beside others, or spread over all groups; some logits."""
    rng = np.random.default_rng(0)
    some = [rng.integers(0, 211, length, dtype=np.int32) for length in (200, 30, 65, 10)]
    doomed = engine.submit(mn.Request("doomed", some[0], max_new_tokens=20, stop_ids=()))
    beside = engine.submit(mn.Request("beside", some[1], max_new_tokens=20, stop_ids=()))
    for _ in range(12):
        engine.tick()
    if decides:
        doomed.cancel()
    tokens = [list(beside.result().tokens), list(doomed.result().tokens)]
    tokens += [r.tokens for r in engine.generate(some, max_new_tokens=6, stop_ids=())]
    logits = engine.logits(some[2], [0, 40, 64])
    return dict(
        tokens=tokens, reason=doomed.reason, ticks=engine.scheduler.tick, logits=np.round(logits, 3)[:, :8].tolist()
    )


if __name__ == "__main__":
    coordinator, processes, index, folder = sys.argv[1:]
    mn.start_processes(coordinator, int(processes), int(index))
    engine = mn.Engine.load(folder, mn.MeshSpec(2, 2, 2), mn.ServeConfig(**SMALL))
    engine.executor._start_s -= 1000.0 * int(index)
    print(json.dumps(work(engine, decides=index == "0")))
