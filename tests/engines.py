"""Small engines for tests, made once each."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np

import mnemosyne_jax as mn
from tests.make_checkpoint import make

EXPECTED = Path(__file__).parent / "expected"
FAMILIES = ("llama3", "llama", "llama_yarn", "mistral", "qwen2", "qwen3")

# By dtype: the largest difference of a logit between two ways of computing it. |logit| goes up to about 10 here.
LOGIT_TOLERANCE = {"float32": 2e-4, "bfloat16": 0.5}

SMALL = dict(page_tokens=16, pool_pages=32, private_rows=4, chunk_tokens=64, chunk_buckets=(64,), span_tokens=64)


@functools.cache
def folder(family: str) -> Path:
    """A checkpoint folder of the family, made once a session."""
    return make(family, Path(tempfile.mkdtemp()) / family)


@functools.lru_cache(maxsize=6)  # every program holds hundreds of memory maps, and a process has 65,530
def engine(
    family: str = "llama3", kvp: int = 1, spp: int = 1, tp: int = 1, dtype: str = "float32", **serve
) -> mn.Engine:
    """An Engine over the family's checkpoint; tests that ask for the same one soon after share it."""
    return mn.Engine.load(folder(family), mn.MeshSpec(kvp, spp, tp), mn.ServeConfig(**(SMALL | serve)), dtype)


@functools.cache
def expected(family: str) -> dict[str, np.ndarray]:
    """What Hugging Face says of a prompt: see make_expected.py."""
    return dict(np.load(EXPECTED / f"{family}.npz"))


def agreeing_tokens(tokens: list[int], reference: np.ndarray, gaps: np.ndarray, tolerance: float) -> int:
    """How many leading tokens are equal; a difference is allowed only where the top-2 gap is within the tolerance."""
    for i, (token, right) in enumerate(zip(tokens, reference, strict=True)):
        if token != right:
            assert gaps[i] <= 2 * tolerance, f"token {i} is {token}, not {right}, at a gap of {gaps[i]:.4f}"
            return i
    return len(tokens)


def assert_matches_hugging_face(family: str) -> None:
    """On one device, logits within the tolerance and every greedy token the same."""
    want, tolerance = expected(family), LOGIT_TOLERANCE["float32"]
    logits = engine(family).logits(want["prompt"], want["positions"])
    print(f"{family}: max |difference of logits| {np.abs(logits - want['logits']).max():.1e}")
    assert np.abs(logits - want["logits"]).max() <= tolerance
    (result,) = engine(family).generate([want["prompt"]], max_new_tokens=len(want["tokens"]), stop_ids=())
    assert agreeing_tokens(result.tokens, want["tokens"], want["gaps"], tolerance) == len(want["tokens"])
