"""Mixed traffic at a tiny size: who waits for whom, counted in ticks; what is recorded, checked and drawn."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

import mnemosyne_jax as mn
from experiments import clocks, command_line, mixed, results
from experiments import mixed_figure as record
from experiments.bench_engine_runs import TimedEngine, TimedExecutor
from experiments.kernel_record import Found
from experiments.mixed import MixedConfig, serve_mixed
from experiments.mixed_figure import Run, Tick
from mnemosyne_jax.mesh import make_mesh
from mnemosyne_jax.model.params import init

TINY = dict(width=32, ffn=64, vocab=96, layers=2, heads=4, kv_heads=2, head_dim=8, dtype="float32")
MODEL = mn.ModelConfig(**TINY)
SLOW = mn.HardwareConfig(matmul_flops_per_s=8e9, hbm_bytes_per_s=2e9)  # 30 ms hold fewer and fewer of 3,000 tokens
SLOWER = mn.HardwareConfig(matmul_flops_per_s=3e9, hbm_bytes_per_s=7.5e8)  # also if ticks are seen to take half of it
TICK_S = 0.02
SERVE = mn.ServeConfig(page_tokens=16, private_rows=8, chunk_tokens=128, chunk_buckets=(32, 128), span_tokens=256)
VARIANTS = {
    "lars-adaptive": {"policy": "lars", "chunking": "adaptive"},
    "fcfs": {"policy": "fcfs", "chunking": "fixed", "late": "serve", "chunk_tokens": 32},
    "fcfs-exclusive": {"policy": "fcfs_exclusive", "chunking": "fixed", "late": "serve"},
}
CONFIG = MixedConfig(
    long_tokens=3000, short_tokens=40, short_new_tokens=6, short_every_s=0.2, serve=SERVE, variants=VARIANTS
)
DECODING = replace(
    CONFIG, short_every_s=0, decodes=3, decode_new_tokens=1000, serve=replace(SERVE, private_rows=5)
)  # rows and programs of the same sizes
B_WORK = dict(shape="llama-3-8b", context=262_144, variant="lars-adaptive", beside="1024 in 32 out every 1 s")
A_WORK = dict(shape="llama-3.2-1b", context=524_288, variant="lars-adaptive", beside="16 decodes")
H100 = "NVIDIA H100 80GB HBM3"
SMALL = [
    *("--long_tokens", "600", "--short_tokens", "20", "--short_new_tokens", "3", "--short_every_s", "0.05"),
    *("--serve.page_tokens", "16", "--serve.private_rows", "4", "--serve.chunk_tokens", "64"),
    *("--serve.chunk_buckets", "[32, 64]", "--variants", json.dumps(VARIANTS)),
    *("--matmul_size", "64", "--copy_bytes", "65536", "--sample_ms", "0.1"),
]


class TickClock(TimedExecutor):
    """Its time goes by ticks: a run is the same on any machine."""

    ticks = 0

    def now(self):
        return TICK_S * self.ticks

    def step(self, batch):
        self.ticks += 1
        return super().step(batch)


@pytest.fixture(scope="module")
def executors():
    return {}


@pytest.fixture
def serve(executors):
    def run(config, variant, end_s=math.inf, hardware=SLOW):
        if config.mesh not in executors:
            mesh = make_mesh(config.mesh)
            settings = replace(DECODING, mesh=config.mesh).serve_for(variant)
            executors[config.mesh] = TickClock(MODEL, init(MODEL, mesh, np.float32), settings, mesh)
        engine = TimedEngine(executors[config.mesh], config.serve_for(variant), hardware)
        run = serve_mixed(config, engine, end_s)
        assert engine.loop.idle and not engine.scheduler.sequences and not engine.loop.batches
        assert engine.scheduler.places.pools[0].free == engine.scheduler.places.pools[0].size
        return run

    return run


def column(run, name):
    return np.array(run.ticks[name])


# The work.


@pytest.mark.parametrize("variant", VARIANTS)
def test_whose_end_short_requests_wait_for(serve, variant):
    """Everyone is served to the end. Without preemption nobody enters before the long prompt's end, else all do."""
    run = serve(CONFIG, variant, hardware=SLOWER)
    count, until_s = len(run.short_ttft_s), run.long_ttft_s
    assert count == 1 + math.floor(until_s / 0.2) >= 3 and run.short_finished == count
    assert len(run.short_tbt_s) == count * 5 and not run.decode_tbt_s
    long_tokens, other_tokens = column(run, "long_tokens"), column(run, "other_tokens")
    assert long_tokens.sum() == 3000 and other_tokens.sum() == 40 * count
    last = np.flatnonzero(long_tokens)[-1]
    waits_s = np.array(run.short_ttft_s)
    if variant == "fcfs-exclusive":
        assert not other_tokens[: last + 1].any() and (waits_s + 0.2 * np.arange(count) > until_s).all()
    elif variant == "lars-adaptive":
        assert other_tokens[: last + 1].sum() >= 40 * (count - 1) and (waits_s <= 6 * TICK_S + 1e-6).all()
        assert long_tokens[last - 1] < max(long_tokens)
    else:
        assert waits_s[0] + 1e-6 > until_s and set(long_tokens[:last]) == {32}


@pytest.mark.parametrize("mesh", [mn.MeshSpec(), mn.MeshSpec(spp=2)], ids=str)
def test_ticks_beside_steady_decodes(serve, mesh):
    """Ticks keep the budget of decodes, whose tokens come in those that hold their rows; chunks shrink as keys grow."""
    run = serve(replace(DECODING, mesh=mesh), "lars-adaptive")
    chunks, decodes = column(run, "long_tokens"), column(run, "decodes")
    last = np.flatnonzero(chunks)[-1]
    assert set(run.ticks["budget_s"][: last + 1]) == {0.03 / mesh.spp}
    if mesh.spp == 1:
        assert (decodes[: last + 1] == 3).all()
        assert (np.diff(chunks[:last]) <= 0).all() and chunks[0] > chunks[last - 1] >= 32
    else:  # every other tick
        assert decodes[: last + 1].sum() == pytest.approx(1.5 * (last + 1), abs=3)
    assert run.decodes_ended == 0 and run.short_ttft_s == [] and not column(run, "other_tokens").any()
    assert np.allclose(column(run, "took_s"), TICK_S)
    assert column(run, "end_s")[last] == pytest.approx(run.long_ttft_s)
    assert np.allclose(run.decode_tbt_s, mesh.spp * TICK_S)
    assert serve(replace(DECODING, mesh=mesh, decode_new_tokens=5), "lars-adaptive").decodes_ended == 3


def test_what_is_out_of_time_is_cancelled(serve):
    """After the first tick, here."""
    run = serve(CONFIG, "lars-adaptive", end_s=-math.inf)
    assert run.long_ttft_s is None and run.short_ttft_s == [None] and run.short_finished == 0
    assert 0 < sum(run.ticks["long_tokens"]) <= 128 and len(run.ticks["took_s"]) == 1
    made = record.numbers(run, 1e12)
    assert made[record.LONG_TTFT] == (math.inf, "s") and math.isnan(made[record.RATE][0])
    assert made["short TTFT p50"] == (math.inf, "s") and made[record.UNFINISHED] == (1, "requests")
    assert "long TTFT inf s" in record.line(made)


# The record.


def made_up(ttft_s=0.1, tbt_s=0.0301, long_ttft_s=40.0, took_s=0.027, finished=4, ended=0):
    """A run of four short requests and four ticks, all alike."""
    ticks = [Tick(512, 100, 3, 0.03, 5e-4, took_s * i) for i in range(6)]
    return Run(long_ttft_s, [ttft_s] * 4, [tbt_s] * 8, finished, [0.028] * 4, ended, record.columns(ticks, 1, 0.0))


def verdict(run, where, device_kind=H100, tp=1):
    """(whether every must is met, how many there are)"""
    found = Found(None)
    record.add_rows(found, record.numbers(run, 2e15), device_kind, mn.MeshSpec(tp=tp), **where)
    return results.check({"rows": found.rows}), sum("must" in row for row in found.rows)


def test_numbers_of_a_run():
    made = record.numbers(made_up(took_s=0.024), 2e15)
    assert made[record.LONG_TTFT] == (40.0, "s") and made[record.RATE] == (pytest.approx(50), "TFLOP/s")
    assert made["short TTFT p99"] == (0.1, "s") and made["short TBT p99"] == (pytest.approx(30.1), "ms")
    assert made["tick over its budget mean"] == (pytest.approx(0.8), "1") and made["long chunk p50"] == (512, "tokens")
    assert made["tick max"] == (pytest.approx(0.024), "s") and made["host time p50"] == (pytest.approx(500), "us")
    assert made["ticks"] == (5, "1") and made["decode TBT p50"] == (pytest.approx(28), "ms")
    assert "TTFT p50/p90/p99 0.1/0.1/0.1 s" in record.line(made)


def test_verdict(capsys):
    assert verdict(made_up(), B_WORK) == (True, 4)
    assert "aim <= 0.12 reached: short TTFT p99" in capsys.readouterr().out
    for missing in (dict(ttft_s=0.26), dict(ttft_s=None), dict(tbt_s=0.034), dict(long_ttft_s=44.0), dict(finished=3)):
        assert verdict(made_up(**missing), B_WORK) == (False, 4)
    assert verdict(made_up(), A_WORK) == (True, 3)
    for missing in (dict(took_s=0.025), dict(took_s=0.034), dict(ended=1)):
        assert verdict(made_up(**missing), A_WORK) == (False, 3)
    assert verdict(made_up(), B_WORK, "NVIDIA H200") == (True, 4)
    slow = made_up(ttft_s=9.0)
    for where in (dict(variant="fcfs"), dict(context=131_072), dict(shape="tiny"), dict(beside="nothing")):
        assert verdict(slow, B_WORK | where) == (True, 0)
    assert verdict(slow, B_WORK, "cpu") == (True, 0) == verdict(slow, B_WORK, tp=2)


def test_targets_are_those_of_the_yaml():
    """What is written beside the long prompt in words is what the YAML file asks for, and what rivals were given."""
    config = command_line.read(MixedConfig, ["--config_path", "configs/mixed.yaml"])
    work = config.model.split("/")[-1].removesuffix(".yaml"), config.long_tokens, record.beside(vars(config))
    assert work == tuple(B_WORK[name] for name in ("shape", "context", "beside")) and work in record.RIVAL_POINTS
    assert record.AIMED in config.variants and all(config.serve_for(variant) for variant in config.variants)
    decoding = replace(config, decodes=16, short_every_s=0)
    assert record.beside(vars(decoding)) == A_WORK["beside"]
    assert record.beside(vars(replace(decoding, decodes=0))) == "nothing"
    assert record.beside(vars(replace(config, decodes=2))) == "2 decodes, 1024 in 32 out every 1 s"


def test_rows_and_pages_hold_all_that_can_run_at_once():
    serve = DECODING.serve_for("fcfs")
    assert serve.private_rows == 8 and serve.policy == "fcfs" and serve.chunk_buckets == (32, 128)
    assert serve.pool_pages == 188 + 5 * 3 + 3 * 65  # of 16 tokens: 3,000; 40 + 5; 40 + 999


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(exit code, record, folder) of a whole run, in real time."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "tiny.yaml").write_text(json.dumps(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clocks, "REST_S", 0)
        files = ["--model", str(folder / "tiny.yaml"), "--out", str(folder / "a.json"), "--plot", str(folder / "a.png")]
        code = mixed.main([*SMALL, *files, "--only", "[lars-adaptive, fcfs-exclusive]", "--check"])
    return code, json.loads((folder / "a.json").read_text()), folder


def test_record_of_a_whole_run(run):
    code, made, _ = run
    assert code == 0 and made["absent"] == [] and "nearest ranks" in made["convention"]
    assert made["ceilings"]["matmul_tflops_at_the_end"] > 0
    assert list(made["runs"]) == ["lars-adaptive", "fcfs-exclusive"]
    for variant, of in made["runs"].items():
        rows = {row["name"]: row for row in made["rows"] if row.get("variant") == variant}
        count = len(of["short_ttft_s"])
        assert {row["beside"] for row in rows.values()} == {"20 in 3 out every 0.05 s"}
        assert rows["short requests"]["value"] == of["short_finished"] == count > 0
        assert rows["short requests unfinished"]["value"] == 0 and len(of["short_tbt_s"]) == 2 * count
        assert rows["long TTFT"]["value"] == pytest.approx(of["long_ttft_s"], rel=1e-3)
        assert len({len(values) for values in of["ticks"].values()}) == 1 and sum(of["ticks"]["long_tokens"]) == 600
        assert all(row.get("value") is not None for row in rows.values()) and not any(
            "must" in row for row in rows.values()
        )


def test_pictures(run):
    pytest.importorskip("matplotlib")
    _, made, folder = run
    first = (folder / "a.png").read_bytes()
    assert mixed.main(["--redraw", f"[{folder / 'a.json'}]", "--plot", str(folder / "b.png")]) == 0
    assert first.startswith(b"\x89PNG") and (folder / "b.png").read_bytes() == first
    alone = made | {"runs": {"another": made["runs"]["fcfs-exclusive"]}}
    assert list(record.together([made, alone])["runs"]) == ["lars-adaptive", "fcfs-exclusive", "another"]
    with pytest.raises(ValueError, match="records of"):
        record.together([made, made | {"config": made["config"] | {"decodes": 3}}])
    config = command_line.read(MixedConfig, ["--config_path", "configs/mixed.yaml"])
    ttft, tbt, *ticks = record.figure(made | {"config": asdict(config)}).axes
    rivals = [f"{record.RIVAL}: budget {words}" for words in ("8192, the default", "2048", "8192, threshold 2048")]
    assert [line.get_label() for line in ttft.lines][:5] == [*made["runs"], *rivals]
    assert list(tbt.lines[-2].get_xdata()) == [0.099, 0.146] and len(ticks) == 2 * len(made["runs"])
    nobody = {variant: of | {"short_ttft_s": [], "short_tbt_s": []} for variant, of in made["runs"].items()}
    tbt, *ticks = record.figure(made | {"runs": nobody}).axes
    assert tbt.get_xlabel() == "time between tokens (s)" and len(ticks) == 2 * len(nobody)


def test_what_is_absent_is_no_success(run, tmp_path, monkeypatch):
    monkeypatch.setattr(clocks, "REST_S", 0)
    late = ["--model", str(run[2] / "tiny.yaml"), "--seconds", "0"]
    for args, reason in ((late, "no time left"), (["--model", str(tmp_path / "none.yaml")], "none.yaml")):
        assert mixed.main([*SMALL, *args, "--out", str(tmp_path / "a.json"), "--check"]) == 1
        made = json.loads((tmp_path / "a.json").read_text())
        assert not made["runs"] and all(reason in left_out["reason"] for left_out in made["absent"])


def test_refuses(capsys):
    for args, reason in (
        (["--redraw", "[a.json]"], "needs --plot"),
        (["--long_tokens", "0"], "long_tokens: got 0, must be at least 1"),
        (["--short_every_s", "-1"], "short_every_s: got -1.0, must be 0 or more"),
        (["--only", "[other]"], "only: got ['other'], must be of lars-adaptive"),
        (["--variants", "{a: {page_tokens: 8}}"], "variants.a: got ['page_tokens'], may change policy, late"),
        (["--variants", "{a: {policy: mine}}"], "serve.policy: got 'mine'"),
    ):
        with pytest.raises(SystemExit):
            mixed.main(args)
        assert reason in capsys.readouterr().err, reason
