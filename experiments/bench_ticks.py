"""What single ticks take back to back without rest, and at which clock and power: what bounds them.

`python -m experiments.bench_ticks --config_path configs/bench_ticks.yaml --out FILE.json` runs chunks of chosen sizes
after chosen contexts, beside decodes, each for a second in every turn. Weights, keys and values are random; a row is
said to have as many keys as wanted (`tick_loads`).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

# Weights and the cache of a long prompt need more of a GPU than the three quarters that JAX takes by itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
import jax.numpy as jnp

import mnemosyne_jax as mn
from experiments import calibrate, command_line, results
from experiments.devices import use_virtual_devices
from experiments.power import Sampled
from experiments.tick_loads import TickLoads, loads_of
from mnemosyne_jax.planning import hardware_of
from mnemosyne_jax.serve.batch import Batch


@dataclass(frozen=True)
class BenchTicksConfig:
    """`ticks` are [tokens of a chunk, keys it sees with its own]; no tokens: no chunk. In each, `decodes` rows of
    `decode_keys` keys decode. The longest tick heats the devices for `heat_s` before the first turn.

    `hardware` predicts them (None: by the kind of the devices). `virtual_devices` is how many CPU devices to pretend
    (0: use the devices there are).
    """

    model: str = "configs/model/llama-3-8b.yaml"
    ticks: tuple[tuple[int, int], ...] = ((0, 0),)
    decodes: int = 1
    decode_keys: int = 1024
    heat_s: float = 3.0
    seconds: float = 1.0
    turns: int = 2
    hardware: str | None = None
    mesh: mn.MeshSpec = mn.MeshSpec()
    serve: mn.ServeConfig = mn.ServeConfig(pool_pages=2048)
    virtual_devices: int = 0
    out: str | None = None

    def __post_init__(self):
        if not 0 <= self.decodes < self.serve.private_rows:
            raise mn.RequestError(
                "decodes", self.decodes, f"must leave one of {self.serve.private_rows} rows to a chunk"
            )
        held = (self.serve.pool_pages or 0) * self.serve.page_tokens
        if self.decode_keys > held:
            raise mn.RequestError("decode_keys", self.decode_keys, f"are more than the {held} of serve.pool_pages")
        for tokens, keys in self.ticks:
            if not 0 <= tokens <= min(keys, self.serve.buckets[-1]):
                raise mn.RequestError(
                    "ticks", [tokens, keys], f"is no chunk of at most {self.serve.buckets[-1]} tokens"
                )
            if keys > held:
                raise mn.RequestError("ticks", [tokens, keys], f"has more keys than the {held} of serve.pool_pages")


def batch(make: TickLoads, tokens: int, keys: int, decodes: int, decode_keys: int) -> Batch:
    """A chunk of so many tokens, the last of its keys, in every group, and decode rows in other slots."""
    chunks = make.chunks(1, tokens, keys - tokens) if tokens else ()
    taken = {row.slot for row in chunks}
    slots = [row for row in make.decodes(make.serve.private_rows, decode_keys) if row.slot not in taken]
    return Batch(0, tuple(slots[: decodes * make.mesh.kvp]), chunks)


def main(args: list[str] | None = None) -> int:
    """The exit code."""
    config: BenchTicksConfig = command_line.read(BenchTicksConfig, args)
    use_virtual_devices(config.virtual_devices)
    model = mn.from_yaml(mn.ModelConfig, config.model)
    model.refuse_mesh(config.mesh)
    kind = jax.devices()[0].device_kind
    hardware = mn.from_yaml(mn.HardwareConfig, config.hardware) if config.hardware else hardware_of(kind)
    make = TickLoads(config.serve, config.mesh, config.serve.pool_pages or 0, model.vocab)
    batches = [batch(make, *tick, config.decodes, config.decode_keys) for tick in config.ticks]
    loads = loads_of(batches, model, config.serve, config.mesh, jnp.dtype(model.dtype).itemsize)
    predicted_s = loads.seconds(hardware)
    executor = calibrate.built(model, config.serve, config.mesh, make.page_table())
    calibrate.seconds_of(executor, batches[predicted_s.argmax()], config.heat_s)
    rows = []
    for turn in range(config.turns):
        for (tokens, keys), one, expected_s in zip(config.ticks, batches, predicted_s, strict=True):
            with Sampled() as sampled:
                seconds = calibrate.seconds_of(executor, one, config.seconds)
            where: dict[str, Any] = dict(chunk=tokens, context=keys, mesh=str(config.mesh), turn=turn)
            where |= dict(predicted_ms=1e3 * expected_s) | sampled.means
            rows.append(results.row("tick", 1e3 * seconds, "ms", **where))
            at = "".join(f", {value} {name}" for name, value in sampled.means.items())
            took = f"{1e3 * seconds:.2f} ms ({1e3 * expected_s:.2f} predicted){at}"
            print(f"{tokens} after {keys - tokens}: {took}", flush=True)
    if config.out:
        results.write(config.out, results.document(config, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
