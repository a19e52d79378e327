"""Times real ticks of an engine and fits the coefficients of the cost model to them.

    python -m experiments.calibrate --random_model configs/model/NAME.yaml --hardware configs/hardware/NAME.yaml \\
        --out configs/hardware/NEW.yaml --record FILE.json [--plot FILE.png]

Ticks of chosen sizes run through JaxExecutor back to back, as a busy engine runs them: the time of one is that between
two results, so that what the host does meanwhile does not count unless devices wait for it. Every fourth tick is held
out of the fit and tells how far its predictions are off. Weights, keys and values are random. On a GPU, take as many
`--layers` as make the shortest tick, at a third of them, longer than what the host needs for one, about a millisecond.
One process only. Without `--hardware` peak figures are those of a small CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from experiments import calibration_record, command_line, fitting, results
from experiments.bench_engine_runs import fill
from experiments.calibration_record import Timed
from experiments.devices import use_virtual_devices
from experiments.generate import ModelChoice
from experiments.tick_loads import TickLoads, designed, loads_of
from mnemosyne_jax.checkpoint import read_config
from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, RopeConfig, ServeConfig, from_yaml
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.mesh import make_mesh
from mnemosyne_jax.model.params import init
from mnemosyne_jax.runtime import JaxExecutor
from mnemosyne_jax.serve.batch import Batch

SMALL = ModelConfig(
    width=128, ffn=512, vocab=1024, layers=2, heads=4, kv_heads=2, head_dim=32, rope=RopeConfig(theta=1e5),
    dtype="float32",
)  # fmt: skip
POOL_TOKENS = 8_192  # of each group, where `serve.pool_pages` says nothing


@dataclass(frozen=True)
class CalibrateConfig:
    """What to time, and where to write what is found.

    The model is that of a Hugging Face folder (`model.path`: its facts, not its weights), of a YAML file
    (`random_model`), or a small one. `layers` replaces its number of layers (None: its own); a third of them is timed
    too, which tells the overhead of a layer from that of a tick. Ticks that `hardware` predicts to take longer than
    `most_tick_s` are left out. Each tick runs `rounds` times for `sample_s`, twice at least. `virtual_devices` is how
    many CPU devices to pretend (0: use the devices there are).
    """

    model: ModelChoice = ModelChoice()
    random_model: str | None = None
    layers: int | None = None
    hardware: str | None = None
    mesh: MeshSpec = MeshSpec()
    serve: ServeConfig = ServeConfig()
    rounds: int = 3
    sample_s: float = 0.02
    most_tick_s: float = 0.25
    virtual_devices: int = 0
    out: str | None = None
    record: str | None = None
    plot: str | None = None
    check: bool = False


def models(config: CalibrateConfig) -> list[ModelConfig]:
    """The model at a third of its layers, and at all of them; once if it has too few for two."""
    if config.model.path is not None:
        model = read_config(config.model.path)
    else:
        model = SMALL if config.random_model is None else from_yaml(ModelConfig, config.random_model)
    model = replace(model, layers=config.layers or model.layers, dtype=config.model.dtype or model.dtype)
    model.refuse_mesh(config.mesh)
    third = max(1, model.layers // 3 // config.mesh.spp) * config.mesh.spp
    return [replace(model, layers=layers) for layers in sorted({third, model.layers})]


def settings(config: CalibrateConfig) -> tuple[HardwareConfig, ServeConfig]:
    """(peak figures to fit shares of, how to serve)."""
    device = jax.devices()[0]
    if config.hardware is None and device.platform != "cpu":
        raise RequestError("hardware", None, f"must name a file of the peak figures of a {device.device_kind}")
    hardware = HardwareConfig() if config.hardware is None else from_yaml(HardwareConfig, config.hardware)
    pages = config.serve.pool_pages or -(-POOL_TOKENS // config.serve.page_tokens)
    return hardware, replace(config.serve, pool_pages=pages)


def timed(config: CalibrateConfig, hardware: HardwareConfig, serve: ServeConfig) -> Timed:
    """The ticks of every model that are predicted to take no longer than asked, timed."""
    parts, ticks, measured_s = [], [], []
    for model in models(config):
        make = TickLoads(serve, config.mesh, serve.pool_pages or 0, model.vocab)
        some = designed(make)
        loads = loads_of([t.batch for t in some], model, serve, config.mesh, jnp.dtype(model.dtype).itemsize)
        short = loads.seconds(hardware) <= config.most_tick_s
        parts.append(loads.where(short))
        ticks += (some := [tick for tick, kept in zip(some, short, strict=True) if kept])
        say(f"{model.layers} layers on {config.mesh}: {len(some)} ticks, {np.count_nonzero(~short)} too long")
        if len(some) < calibration_record.HELD_OUT_EVERY:
            raise RequestError("most_tick_s", config.most_tick_s, f"leaves {len(some)} ticks: too few to hold one out")
        executor = built(model, serve, config.mesh, make.page_table())
        rounds = []
        for i in range(config.rounds):  # the ticks take turns, so that a slow minute is a round of each, not all of one
            begin_s = time.perf_counter()
            rounds.append([seconds_of(executor, tick.batch, config.sample_s) for tick in some])
            say(f"round {i + 1} of {config.rounds}: {time.perf_counter() - begin_s:.1f} s")
        measured_s.append(np.median(rounds, axis=0))
        del executor  # makes room for the next
    return Timed(tuple(parts), tuple(ticks), np.concatenate(measured_s))


def built(model: ModelConfig, serve: ServeConfig, mesh: MeshSpec, page_table: np.ndarray) -> JaxExecutor:
    """An executor with every program compiled, random keys and values, and these pages in its tables."""
    begin_s, device_mesh = time.perf_counter(), make_mesh(mesh)
    executor = JaxExecutor(model, init(model, device_mesh, jnp.dtype(model.dtype)), serve, device_mesh)
    programs = executor.warmup(lambda done, total: say(f"built {done} of {total} programs"))
    fill(executor)
    state = executor._allocated()
    tables = state.cache.page_table
    tables = jax.device_put(np.broadcast_to(page_table, tables.shape), tables.sharding)
    executor._state = replace(state, cache=replace(state.cache, page_table=tables))
    say(f"{programs} programs, kernels {executor.impl}, ready in {time.perf_counter() - begin_s:.1f} s")
    return executor


def seconds_of(executor: JaxExecutor, batch: Batch, sample_s: float) -> float:
    """Seconds from tick to tick while each stage works on such a batch: a mean over `sample_s`, or two ticks."""
    result = None
    for _ in range(executor.spec.spp + executor.serve.ahead):
        result = executor.step(batch)
    assert result is not None
    begin_s, ticks = result.time_s, 0
    while ticks < 2 or result.time_s - begin_s < sample_s:
        result, ticks = executor.step(batch), ticks + 1
        assert result is not None
    return (result.time_s - begin_s) / ticks


def say(line: str) -> None:
    print(line, flush=True)


def main(args: Sequence[str] | None = None) -> int:
    """The exit code: 1 if a must is missed that was to be checked, 2 for a refusal."""
    config: CalibrateConfig = command_line.read(CalibrateConfig, args)
    use_virtual_devices(config.virtual_devices)
    begin_s = time.perf_counter()
    try:
        before, serve = settings(config)
        found = timed(config, before, serve)
    except RequestError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    fit_begin_s = time.perf_counter()
    after = fitting.fit(found.parts, found.measured_s, before, ~found.held_out)
    say(f"fitted to {np.count_nonzero(~found.held_out)} ticks in {time.perf_counter() - fit_begin_s:.1f} s")
    rows = calibration_record.rows_of(found, before, after)
    rows.append(results.row("run", time.perf_counter() - begin_s, "s", mesh=str(config.mesh)))
    for line in calibration_record.lines(rows):
        say(line)
    made = results.document(config, rows)
    if config.out:
        say(f"coefficients in {calibration_record.write_hardware(config.out, after, made)}")
    if config.record:
        say(f"record in {results.write(config.record, made)}")
    if config.plot:
        calibration_record.figure(found, after).savefig(config.plot, dpi=120)
    return 0 if not config.check or results.check(made) else 1


if __name__ == "__main__":
    sys.exit(main())
