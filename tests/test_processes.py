"""Two processes of four devices give what one process of eight gives."""

import json
import os
import socket
import subprocess
import sys

import numpy as np

from tests.engines import engine, folder
from tests.run_process import work


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_as_one():
    """With a cancel that only process 0 asks for, and clocks 1,000 s apart: tokens, ticks and logits agree.

    Who goes first depends on the time, so how many ticks it takes is not that of another run; the answers are.
    """
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    coordinator = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "tests.run_process", coordinator, "2"]
    runs = [
        subprocess.Popen(
            [*command, str(i), str(folder("llama3"))],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        answers = [json.loads(run.communicate(timeout=300)[0].splitlines()[-1]) for run in runs]
    finally:
        for run in runs:
            run.kill()
    want = work(engine("llama3", 2, 2, 2))
    assert answers[0] == answers[1]
    assert answers[0]["reason"] == "cancelled"
    (beside, doomed, *others), (right, until_cancelled, *rest) = answers[0]["tokens"], want["tokens"]
    assert beside == right and others == rest
    assert all(a == b for a, b in zip(doomed, until_cancelled, strict=False)) and len(doomed) < 20
    np.testing.assert_allclose(answers[0]["logits"], want["logits"], atol=2e-3)
