"""Times real ticks of several engines and fits the coefficients of the cost model to all of them together.

    python -m experiments.calibrate --config_path configs/calibrate.yaml --hardware configs/hardware/NAME.yaml \\
        --out configs/hardware/NEW.yaml --record FILE.json [--plot FILE.png]

Ticks of chosen sizes run through JaxExecutor back to back, as a busy engine runs them: the time of one is that between
two results, so that what the host does meanwhile does not count unless devices wait for it. Every fourth tick is held
out of the fit and tells how far its predictions are off. Weights, keys and values are random. Engines are built and
timed one after another. They had better differ in all that the fit is to tell apart (`fitting.fit`): head dim, width,
layers, decode rows. On a GPU, take as many layers as make the shortest tick longer than what the host needs for one,
about a millisecond. One process only. Without `--hardware` peak figures are those of a small CPU.

`--refit FILE.json` fits the ticks of an old record, with the same engines, and times none: as when the cost model has
learned a term.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import calibration_record, command_line, fitting, results
from experiments.bench_engine_runs import fill
from experiments.calibration_record import Timed
from experiments.devices import use_virtual_devices
from experiments.fitting import Loads
from experiments.tick_loads import TickLoads, TimedTick, designed, loads_of
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
class EngineChoice:
    """What tells an engine from others: a model, how many of its layers, and decode rows.

    The model is that of a YAML file, of a Hugging Face folder (its facts, not its weights), or a small one (None).
    `layers` and `decode_rows` are None for the model's own and for `serve.private_rows`.
    """

    model: str | None = None
    layers: int | None = None
    decode_rows: int | None = None


@dataclass(frozen=True)
class CalibrateConfig:
    """What to time, and where to write what is found.

    `serve` holds of all `engines`, but for decode rows: where an engine has more or fewer, its chunk buckets have as
    many fewer or more, so that its programs have the rows of the others'. `dtype` is another than the models' own.
    Ticks that `hardware` predicts to take longer than `most_tick_s` are left out. Each tick runs `rounds` times for
    `sample_s`, twice at least. `virtual_devices` is how many CPU devices to pretend (0: use the devices there are).
    """

    engines: tuple[EngineChoice, ...] = (EngineChoice(layers=4), EngineChoice(decode_rows=4))
    dtype: str | None = None
    hardware: str | None = None
    mesh: MeshSpec = MeshSpec()
    serve: ServeConfig = ServeConfig()
    rounds: int = 3
    sample_s: float = 0.02
    most_tick_s: float = 0.25
    virtual_devices: int = 0
    refit: str | None = None
    out: str | None = None
    record: str | None = None
    plot: str | None = None
    check: bool = False


def engine(config: CalibrateConfig, choice: EngineChoice) -> tuple[str, ModelConfig, ServeConfig]:
    """(what to call it, the model, how it serves) of an engine to be timed.

    Raises: RequestError if the model does not divide over the mesh, or decode rows leave a program no place for chunks.
    """
    serve, model = config.serve, facts(choice.model)
    model = replace(model, layers=choice.layers or model.layers, dtype=config.dtype or model.dtype)
    model.refuse_mesh(config.mesh)
    rows = choice.decode_rows or serve.private_rows
    more = rows - serve.private_rows
    if more >= serve.buckets[0]:
        raise RequestError("engines.decode_rows", rows, f"leaves the smallest bucket, {serve.buckets[0]}, no chunk")
    buckets = tuple(bucket - more for bucket in serve.buckets)
    pages = serve.pool_pages or -(-POOL_TOKENS // serve.page_tokens)
    serve = replace(serve, private_rows=rows, chunk_buckets=buckets, chunk_tokens=buckets[-1], pool_pages=pages)
    shape = "small" if choice.model is None else Path(choice.model).stem
    return f"{shape}, {model.layers} layers, {rows} decode rows", model, serve


def facts(path: str | None) -> ModelConfig:
    """The model of a YAML file or of a Hugging Face folder; the small one."""
    if path is None:
        return SMALL
    return read_config(path) if Path(path).is_dir() else from_yaml(ModelConfig, path)


def peak_figures(config: CalibrateConfig) -> HardwareConfig:
    """The hardware whose coefficients are to be fitted."""
    device = jax.devices()[0]
    if config.hardware is None and (config.refit or device.platform != "cpu"):
        kind = "the devices of refit" if config.refit else f"a {device.device_kind}"
        raise RequestError("hardware", None, f"must name a file of the peak figures of {kind}")
    return HardwareConfig() if config.hardware is None else from_yaml(HardwareConfig, config.hardware)


def timed(config: CalibrateConfig, hardware: HardwareConfig) -> list[Timed]:
    """The ticks of every engine that are predicted to take no longer than asked, timed."""
    engines = [engine(config, choice) for choice in config.engines]  # what is refused is refused before any is built
    return [timed_engine(config, hardware, *parts) for parts in engines]


def recorded(config: CalibrateConfig, made: Mapping[str, Any]) -> list[Timed]:
    """The ticks of every engine as a record has them."""
    found = []
    for name, model, serve in (engine(config, choice) for choice in config.engines):
        rows = deque(r for r in made["rows"] if r["name"] == "tick" and r["engine"] == name)
        _, ticks, loads = all_ticks(config, model, serve)
        kept, measured_s = np.zeros(len(ticks), bool), []
        for i, tick in enumerate(ticks):  # in the order of the record, less those that were too long
            if rows and (rows[0]["kind"], rows[0]["load"]) == (tick.kind, tick.words):
                kept[i] = True
                measured_s.append(rows.popleft()["value"])
        if rows or not measured_s:
            raise RequestError("refit", config.refit, f"holds other ticks of {name}, or none")
        found.append(Timed(name, loads.where(kept), tuple(itertools.compress(ticks, kept)), np.array(measured_s)))
    return found


def all_ticks(
    config: CalibrateConfig, model: ModelConfig, serve: ServeConfig
) -> tuple[TickLoads, list[TimedTick], Loads]:
    """(what makes them, the ticks of one engine however long, their loads)."""
    make = TickLoads(serve, config.mesh, serve.pool_pages or 0, model.vocab)
    ticks = designed(make)
    batches = [tick.batch for tick in ticks]
    return make, ticks, loads_of(batches, model, serve, config.mesh, jnp.dtype(model.dtype).itemsize)


def timed_engine(
    config: CalibrateConfig, hardware: HardwareConfig, name: str, model: ModelConfig, serve: ServeConfig
) -> Timed:
    """The ticks of one engine, timed; its devices' memory is free again."""
    make, ticks, loads = all_ticks(config, model, serve)
    short = loads.seconds(hardware) <= config.most_tick_s
    ticks = tuple(itertools.compress(ticks, short))
    say(f"{name} on {config.mesh}: {len(ticks)} ticks, {np.count_nonzero(~short)} too long")
    if len(ticks) < calibration_record.HELD_OUT_EVERY:
        raise RequestError("most_tick_s", config.most_tick_s, f"leaves {len(ticks)} ticks: too few to hold one out")
    executor = built(model, serve, config.mesh, make.page_table())
    rounds = []
    for i in range(config.rounds):  # the ticks take turns, so that a slow minute is a round of each, not all of one
        begin_s = time.perf_counter()
        rounds.append([seconds_of(executor, tick.batch, config.sample_s) for tick in ticks])
        say(f"round {i + 1} of {config.rounds}: {time.perf_counter() - begin_s:.1f} s")
    return Timed(name, loads.where(short), ticks, np.median(rounds, axis=0))


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
    begin_s, made = time.perf_counter(), results.document(config, [])
    try:
        before = peak_figures(config)
        if config.refit:
            old = json.loads(Path(config.refit).read_text())
            found = recorded(config, old)
            made |= {key: old[key] for key in ("device", "versions")} | {"timed": old.get("timed", old["command"])}
        else:
            found = timed(config, before)
    except RequestError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    fit_begin_s = time.perf_counter()
    kept = ~calibration_record.held_out(found)
    measured_s = np.concatenate([one.measured_s for one in found])
    after = fitting.fit([one.loads for one in found], measured_s, before, kept)
    say(f"fitted to {np.count_nonzero(kept)} ticks in {time.perf_counter() - fit_begin_s:.1f} s")
    rows = calibration_record.rows_of(found, before, after, on_gpu=made["device"]["platform"] == "gpu")
    rows.append(results.row("run", time.perf_counter() - begin_s, "s", mesh=str(config.mesh)))
    for line in calibration_record.lines(rows):
        say(line)
    made["rows"] = rows
    if config.out:
        say(f"coefficients in {calibration_record.write_hardware(config.out, after, made)}")
    if config.record:
        say(f"record in {results.write(config.record, made)}")
    if config.plot:
        calibration_record.figure(found, after, made["device"]["kind"]).savefig(config.plot, dpi=120)
    return 0 if not config.check or results.check(made) else 1


if __name__ == "__main__":
    sys.exit(main())
