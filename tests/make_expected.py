"""tests/expected/FAMILY.npz: what transformers itself computes in float32 for the folders of make_checkpoint.py.

    /tmp/oracle/venv/bin/python tests/make_expected.py        # Python 3.11 with torch 2.13 (CPU) and transformers 5.23

Each file holds `prompt` int32 [190]; `positions` int32 [24] and `logits` float32 [24, vocab], the teacher-forced logits
of the prompt at those positions; `tokens` int32 [32], the greedy continuation (end-of-sequence ids ignored); `gaps`
float32 [32], the difference of each one's two greatest logits: where it is small, tokens may rightly differ.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from make_checkpoint import FAMILIES, make
from transformers import AutoModelForCausalLM

PROMPT, NEW, SPREAD = 190, 32, 24


def compute(family: str) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(
            make(family, folder), dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()
    vocab = model.config.vocab_size
    prompt = np.random.default_rng(190).integers(0, vocab, PROMPT).astype(np.int32)
    positions = np.unique(np.linspace(0, PROMPT - 1, SPREAD).round()).astype(np.int32)
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    tokens, gaps = [], []
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0]
        last = logits[-1]
        for _ in range(NEW):  # one shot every time: no cache whose own rounding would enter
            best = torch.topk(last, 2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
            last = model(ids, use_cache=False).logits[0, -1]
    return {
        "prompt": prompt,
        "positions": positions,
        "logits": logits[torch.from_numpy(positions).long()].numpy().astype(np.float32),
        "tokens": np.array(tokens, np.int32),
        "gaps": np.array(gaps, np.float32),
    }


if __name__ == "__main__":
    torch.set_num_threads(2)
    out = Path(__file__).parent / "expected"
    out.mkdir(exist_ok=True)
    for family in sys.argv[1:] or FAMILIES:
        found = compute(family)
        np.savez_compressed(out / f"{family}.npz", **found)  # pyright: ignore[reportArgumentType]
        spread, gap, kinds = np.abs(found["logits"]).max(), found["gaps"].min(), len(set(found["tokens"]))
        print(f"{family}: max |logit| {spread:.2f}, least top-2 gap {gap:.4f}, {kinds} distinct tokens")
