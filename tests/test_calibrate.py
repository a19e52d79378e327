"""Calibration: the fit finds what made the ticks, the timed ticks are what they say, the whole script on a CPU."""

import functools
import gc
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from make_checkpoint import make

from experiments import calibrate, command_line, fitting, results
from experiments.tick_loads import TickLoads, designed, loads_of
from mnemosyne_jax.checkpoint import read_config
from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, ServeConfig, from_yaml
from mnemosyne_jax.model.inputs import step_shapes, views
from mnemosyne_jax.packing import pack, smallest_shape
from mnemosyne_jax.planning import tick_time
from mnemosyne_jax.serve.budget import BatchLoad
from tests.world import guessed

LLAMA_1B = from_yaml(ModelConfig, "configs/model/llama-3.2-1b.yaml")
LLAMA_8B = from_yaml(ModelConfig, "configs/model/llama-3-8b.yaml")
H100 = guessed("h100")
MESHES = [MeshSpec(), MeshSpec(2, 2, 2)]
SERVE = ServeConfig(
    pool_pages=600, page_tokens=64, private_rows=16, shared_rows=2, chunk_tokens=2048, chunk_buckets=(64, 512, 2048)
)


def ticks_on(mesh: MeshSpec, serve: ServeConfig = SERVE):
    return designed(TickLoads(serve, mesh, serve.pool_pages or 0, LLAMA_8B.vocab))


# The fit.


def random_hardware(seed):
    """Hardware whose coefficients are far from those of H100; the names of all of them."""
    random = np.random.default_rng(seed)
    found = {name: random.uniform(0.3, 0.95) for name in fitting.SHARES}
    found |= {"softmax_dims": random.uniform(0, 80), "overhead_rows": random.uniform(4, 30)}
    found |= {"layer_overhead_s": random.uniform(1e-5, 1e-4), "tick_overhead_s": random.uniform(0, 1e-3)}
    assert set(found) == {*fitting.SHARES, *fitting.AMOUNTS}
    return replace(H100, **found)


@functools.cache
def two_shapes(mesh):
    """Loads of few layers of the 8B shape with 16 decode rows, and of the 1B shape with four times fewer."""
    few = replace(SERVE, private_rows=4, chunk_buckets=(76, 524, 2060), chunk_tokens=2060)
    engines = ((replace(LLAMA_8B, layers=4), SERVE), (replace(LLAMA_1B, layers=16), few))
    return [loads_of([tick.batch for tick in ticks_on(mesh, serve)], model, serve, mesh, 2) for model, serve in engines]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_fit_predicts_ticks_it_has_not_seen(mesh, seed):
    """Ticks made by coefficients far from the guess, off by 2% at random: the fit comes closer to them than that."""
    random, true, parts = np.random.default_rng(seed), random_hardware(seed), two_shapes(mesh)
    true_s = fitting.predict(parts, true)
    training = np.arange(len(true_s)) % 4 != 3
    found = fitting.fit(parts, true_s * np.exp(0.02 * random.normal(size=len(true_s))), H100, training)
    errors = fitting.relative_errors(fitting.predict(parts, found), true_s)[~training]
    before = fitting.relative_errors(fitting.predict(parts, H100), true_s)[~training]
    print(f"{mesh}: held out, median {np.median(errors):.4f}, max {errors.max():.4f}; before {np.median(before):.2f}")
    assert np.median(errors) <= 0.01 and errors.max() <= 0.03 and np.median(before) > 0.1
    names = (*fitting.SHARES, *fitting.AMOUNTS)
    assert found.fitted and replace(found, **{n: getattr(H100, n) for n in names}, fitted=False) == H100
    assert (found.link_share == H100.link_share) == (mesh == MeshSpec())  # without links nothing tells it


@pytest.mark.parametrize("seed", [0, 1])
def test_two_shapes_tell_coefficients_that_one_leaves_open(seed):
    """Both fits predict the shape they saw; a third shape, only the one that saw two."""
    true, parts = random_hardware(seed), two_shapes(MeshSpec())
    both = fitting.fit(parts, fitting.predict(parts, true), H100)
    for name in (*fitting.SHARES, *fitting.AMOUNTS):
        if name != "link_share":
            assert getattr(both, name) == pytest.approx(getattr(true, name), rel=0.01), name
    one = fitting.fit(parts[:1], fitting.predict(parts[:1], true), H100)
    qwen = from_yaml(ModelConfig, "configs/model/qwen2.5-0.5b.yaml")
    third = [loads_of([tick.batch for tick in ticks_on(MeshSpec())], qwen, SERVE, MeshSpec(), 2)]
    worst = {}
    for name, found in (("one", one), ("both", both)):
        seen = parts[:1] if name == "one" else parts
        assert fitting.relative_errors(fitting.predict(seen, found), fitting.predict(seen, true)).max() <= 0.01
        worst[name] = fitting.relative_errors(fitting.predict(third, found), fitting.predict(third, true)).max()
    assert worst["both"] <= 1e-3 and worst["one"] > 0.03


def test_fit_is_deterministic_and_knows_what_it_need_not_change():
    batches = [tick.batch for tick in ticks_on(MeshSpec())][::5]
    parts = [loads_of(batches, replace(LLAMA_8B, layers=2), SERVE, MeshSpec(), 2)]
    measured_s = fitting.predict(parts, H100)
    first, second = (fitting.fit(parts, measured_s, H100) for _ in range(2))
    assert first == second
    assert fitting.relative_errors(fitting.predict(parts, first), measured_s).max() <= 2e-3
    assert first.link_share == H100.link_share


def test_coefficients_stay_legal():
    """Ticks faster than the peak figures allow push shares to their limit, not over it."""
    parts = [loads_of([tick.batch for tick in ticks_on(MeshSpec())][::5], LLAMA_8B, SERVE, MeshSpec(), 2)]
    found = fitting.fit(parts, fitting.predict(parts, H100) / 100, replace(H100, overhead_rows=0.0, matmul_share=1.0))
    assert found.matmul_share > 0.9 and found.tick_overhead_s < 1e-6


def test_a_chunk_without_keys_costs_nothing_and_leaves_a_slope():
    """A group that holds no key of a shared chunk, and the place of a chunk that a tick does not have."""
    loads = two_shapes(MeshSpec())[0].where(np.array([0, 1]))
    nothing = replace(loads, chunks=np.zeros_like(loads.chunks) + np.array([512.0, 0.0, 0.0]))
    np.testing.assert_allclose(nothing.seconds(H100), replace(loads, chunks=loads.chunks[:, :, :0]).seconds(H100))
    found = fitting.fit([nothing], 2 * nothing.seconds(H100), H100)
    assert all(np.isfinite(getattr(found, name)) for name in (*fitting.SHARES, *fitting.AMOUNTS))


# The ticks.


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_loads_are_what_the_scheduler_counts(mesh):
    """Predictions of the calibration are those of the scheduler for a pipe full of such batches."""
    ticks, time = ticks_on(mesh), tick_time(LLAMA_8B, H100, mesh, SERVE)
    got_s = loads_of([tick.batch for tick in ticks], LLAMA_8B, SERVE, mesh, 2).seconds(H100)
    for tick, seconds in zip(ticks, got_s, strict=True):
        if tick.kind == "empty":  # its chunks have no keys anywhere: no scheduler makes such
            continue
        load = time.with_decodes(BatchLoad.empty(mesh.kvp), tick.batch.decodes)
        for row in tick.batch.chunks:
            load = time.with_chunk(load, row.spans, row.group is None, row.start, row.length)
        assert seconds == pytest.approx(time.seconds((load,) * mesh.spp)), tick.words


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ticks_do_the_work_they_are_timed_for(mesh):
    """Packed for the devices: the program, every row's keys, pages of the pool that no other row reads at the time."""
    make = TickLoads(SERVE, mesh, SERVE.pool_pages, LLAMA_8B.vocab)
    ticks, shapes, table = designed(make), step_shapes(SERVE, mesh), make.page_table()
    assert table.shape == (SERVE.slots(mesh), make.pool_pages)
    assert all(sorted(row) == list(range(make.pool_pages)) for row in table)
    empty = [smallest_shape(shapes, [tick.batch], mesh.kvp) for tick in ticks if tick.kind == "empty"]
    assert sorted(empty, key=shapes.index) == list(shapes)
    for tick in ticks:
        shape = smallest_shape(shapes, [tick.batch], mesh.kvp)
        inputs = views(shape, pack(shape, [tick.batch] * mesh.spp, mesh.kvp))
        loads = loads_of([tick.batch], LLAMA_8B, SERVE, mesh, 2)
        np.testing.assert_array_equal(inputs.decodes.kv_lens.sum(-1), np.tile(loads.decode_keys, (mesh.spp, 1)))
        keys = loads.chunks[0, :, :, 1:].sum((1, 2))
        np.testing.assert_array_equal(inputs.chunks.kv_lens.sum(-1), np.tile(keys, (mesh.spp, 1)))
        assert keys.any() == (tick.kind in ("chunk", "mixed"))
        slots, indices, pages = inputs.deltas.slots, inputs.deltas.indices, inputs.deltas.pages
        new = slots < shape.slots
        assert (table[slots[new], indices[new]] == pages[new]).all()  # the table holds them already
        rows = [*tick.batch.decodes, *tick.batch.chunks]
        assert len({(row.slot, row.group) for row in rows}) == len(rows)
        for group in range(mesh.kvp if tick.kind == "decode" else 0):
            held = [span.pages for row in rows for span in row.spans if span.group == group]
            assert len(np.unique(np.concatenate(held))) == sum(map(len, held)), tick.words


# The script.

TINY = [
    *("--engines", "[{layers: 2}, {layers: 4, decode_rows: 4}]", "--rounds", "1", "--sample_s", "0.001"),
    *("--serve.page_tokens", "16", "--serve.pool_pages", "16", "--serve.private_rows", "2"),
    *("--serve.private_chunks", "1", "--serve.chunk_tokens", "32", "--serve.chunk_buckets", "[32]"),
]
NAMES = ["small, 2 layers, 2 decode rows", "small, 4 layers, 4 decode rows"]


@pytest.mark.parametrize("mesh", [MeshSpec(), MeshSpec(kvp=2, spp=2)], ids=str)
def test_calibrates_this_cpu(mesh, tmp_path, capsys):
    """What must hold of any machine: a whole record, hardware that reads back, predictions that grow with the load."""
    if jax.device_count() < mesh.devices:
        pytest.skip(f"needs {mesh.devices} devices")
    pytest.importorskip("matplotlib")
    out, record, plot = tmp_path / "new" / "cpu.yaml", tmp_path / "cpu.json", tmp_path / "cpu.png"
    args = [*TINY, "--mesh.kvp", str(mesh.kvp), "--mesh.spp", str(mesh.spp), "--out", str(out)]
    assert calibrate.main([*args, "--record", str(record), "--plot", str(plot), "--check"]) == 0
    found, made = from_yaml(HardwareConfig, out), json.loads(record.read_text())
    first = out.read_text().splitlines()[0]
    assert first.startswith("# Fitted on ") and "jax " in first and " by: " in first
    assert found.fitted and plot.read_bytes().startswith(b"\x89PNG")

    rows = made["rows"]
    ticks = [r for r in rows if r["name"] == "tick"]
    assert list(dict.fromkeys(r["engine"] for r in ticks)) == NAMES
    assert all({r["kind"] for r in ticks if r["engine"] == name} >= {"empty", "decode", "chunk"} for name in NAMES)
    assert all(r["value"] > 0 and r["predicted_s"] > 0 for r in ticks)
    held_out = [r["part"] == "held out" for r in ticks]
    assert held_out == [i % 4 == 3 for i in range(len(ticks))]
    error_of = {(r.get("engine"), r.get("kind")): r["value"] for r in rows if r["name"] == "error median"
                and r["part"] == "held out"}  # fmt: skip
    engines, kinds = {r["engine"] for r in ticks}, {r["kind"] for r in ticks}
    for engine in (None, *engines):
        for kind in (None, *kinds):
            among = [r for r, held in zip(ticks, held_out, strict=True)
                     if held and engine in (None, r["engine"]) and kind in (None, r["kind"])]  # fmt: skip
            assert ((engine, kind) in error_of) == bool(among)
            if among:
                median = np.median([abs(r["predicted_s"] / r["value"] - 1) for r in among])
                assert error_of[engine, kind] == pytest.approx(median)
    assert results.check(made)
    assert {r["name"]: r["value"] for r in rows if r["name"] in fitting.SHARES} == {
        name: getattr(found, name) for name in fitting.SHARES
    }
    time = tick_time(calibrate.SMALL, found, mesh, ServeConfig(chunk_tokens=32, chunk_buckets=(32,)))
    chunk_s = [time.cost.chunk_s(tokens, 100) for tokens in (1, 8, 32)]
    assert 0 < chunk_s[0] <= chunk_s[1] <= chunk_s[2] and 0 < time.cost.program_s(8) <= time.cost.program_s(40)
    said = capsys.readouterr().out
    assert "round 1 of 1" in said and "error median (held out)" in said

    refit, again = tmp_path / "again.yaml", tmp_path / "again.json"
    start = tmp_path / "peaks.yaml"
    start.write_text("name: peaks\n")
    args = [*args[:-1], str(refit), "--refit", str(record), "--hardware", str(start), "--record", str(again)]
    assert calibrate.main(args) == 0
    assert replace(from_yaml(HardwareConfig, refit), name="cpu") == found
    assert [r for r in json.loads(again.read_text())["rows"] if r["name"] == "tick"] == ticks
    others = [*args[2:], "--engines", "[{layers: 2}, {layers: 6}]"]  # the second is not in the record
    assert calibrate.main(others) == 2 and "refit: got" in capsys.readouterr().err


@pytest.mark.parametrize(("args", "reason"), [
    (["--mesh.tp", "3"], "mesh.tp: got 3"),
    (["--mesh.spp", "2", "--engines", "[{}, {layers: 3}]"], "mesh.spp: got 2"),
    (["--engines", "[{decode_rows: 40}]"], "engines.decode_rows: got 40"),
    (["--most_tick_s", "1e-6"], "most_tick_s: got 1e-06, leaves 0 ticks"),
])  # fmt: skip
def test_refuses(args, reason, capsys):
    assert calibrate.main(args) == 2
    assert reason in capsys.readouterr().err


def test_engines_are_those_asked_for(tmp_path):
    """Programs of engines with few decode rows and with many have the same rows."""
    config = command_line.read(calibrate.CalibrateConfig, ["--config_path", "configs/calibrate.yaml"])
    made = [calibrate.engine(config, choice) for choice in config.engines]
    assert [model for _, model, _ in made] == [LLAMA_1B, replace(LLAMA_8B, layers=12), replace(LLAMA_8B, layers=6)]
    assert [name for name, _, _ in made][2] == "llama-3-8b, 6 layers, 64 decode rows"
    rows = [[shape.tokens for shape in step_shapes(serve, config.mesh)] for _, _, serve in made]
    assert rows == [[8, 128, 512, 2048, 8192]] * 2 + [[64, 128, 512, 2048, 8192]]
    assert all(serve.pool_pages == 2048 and serve.chunk_tokens == serve.buckets[-1] for _, _, serve in made)
    folder = make("llama", tmp_path)
    _, model, _ = calibrate.engine(replace(config, dtype="float16"), calibrate.EngineChoice(str(folder), layers=2))
    assert model == replace(read_config(folder), layers=2, dtype="float16")


def test_memory_of_an_engine_is_free_before_the_next(monkeypatch):
    config = command_line.read(calibrate.CalibrateConfig, TINY)
    held_bytes = []

    def built(*args):
        gc.collect()
        held_bytes.append(sum(x.nbytes for x in jax.live_arrays()))
        return build(*args)

    build = calibrate.built
    monkeypatch.setattr(calibrate, "built", built)
    found = calibrate.timed(config, HardwareConfig())
    one_bytes = 4 * calibrate.SMALL.weights
    assert len(found) == 2 and held_bytes[1] - held_bytes[0] < one_bytes / 10
