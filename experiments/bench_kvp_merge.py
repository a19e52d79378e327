"""Merging partial attentions over kvp groups: the all-gather against the ring, by size of message.

`python -m experiments.bench_kvp_merge --out FILE` times both on 2, 4, ... of the devices there are, one group each, and
says from which size on the ring is faster: `model/partial.py` takes its RING_FROM_BYTES from here.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import command_line, results
from experiments.clocks import jax_clock, time_calls
from mnemosyne_jax.config import MeshSpec
from mnemosyne_jax.mesh import make_mesh
from mnemosyne_jax.model.partial import Partial, gather_merge, ring_merge

FORMS = {"all-gather": gather_merge, "ring": ring_merge}


@dataclass(frozen=True)
class BenchKvpMergeConfig:
    """Partials of so many `tokens` of `heads` x `head_dim` in each group; `calls` merges in one launch."""

    tokens: tuple[int, ...] = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    heads: int = 32
    head_dim: int = 128
    calls: int = 8
    sample_ms: float = 10.0
    out: str | None = None
    check: bool = False


def seconds(config: BenchKvpMergeConfig, mesh: Mesh, merge, tokens: int) -> float:
    """Median seconds of one merge, each on the result of the one before, so that none overlaps."""
    groups = mesh.shape["kvp"]

    def chain(part: Partial) -> Partial:
        for _ in range(config.calls):
            part = merge(part)
        return part

    spec = PartitionSpec("kvp")
    run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    shape = (groups * tokens, config.heads, config.head_dim)
    draw = functools.partial(jax.jit, out_shardings=NamedSharding(mesh, spec))
    part = Partial(
        draw(lambda: jax.random.normal(jax.random.key(0), shape, jnp.float32))(),
        draw(lambda: jax.random.normal(jax.random.key(1), shape[:2], jnp.float32))(),
    )
    return time_calls(jax_clock(lambda: run(part)), config.calls, config.sample_ms / 1e3).median_s


def main(args: list[str] | None = None) -> int:
    config = command_line.read(BenchKvpMergeConfig, args)
    rows, groups = [], 2
    while groups <= jax.device_count():
        mesh = make_mesh(MeshSpec(kvp=groups))
        for tokens in config.tokens:
            message_bytes = 4 * tokens * config.heads * (config.head_dim + 1)
            took_us = {name: 1e6 * seconds(config, mesh, merge, tokens) for name, merge in FORMS.items()}
            for name, value in took_us.items():
                where = dict(mesh=f"kvp {groups}", by=name, tokens=tokens, message_bytes=message_bytes)
                rows.append(results.row("merge over kvp", round(value, 1), "us", **where))
            shown = ", ".join(f"{name} {value:.1f} us" for name, value in took_us.items())
            print(f"kvp {groups}, {tokens} tokens, {message_bytes / 2**20:.2f} MiB: {shown}", flush=True)
        groups *= 2
    made = results.document(config, rows)
    if config.out:
        results.write(config.out, made)
    return 0 if not config.check or results.check(made) else 1


if __name__ == "__main__":
    sys.exit(main())
