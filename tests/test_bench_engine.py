"""The engine's benchmark at tiny sizes on CPUs: what it counts, what a planted prompt decodes, its record."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import mnemosyne_jax as mn
from experiments import bench_engine, bench_engine_figure, clocks, command_line, results
from experiments import bench_engine_profile as profile
from experiments import bench_engine_record as record
from experiments.bench_engine import BenchEngineConfig
from experiments.bench_engine_runs import TimedEngine, TimedExecutor, fill, plant, pool_pages, random_prompt, run_prompt
from mnemosyne_jax.mesh import make_mesh
from mnemosyne_jax.model.params import init
from mnemosyne_jax.planning import plan

MODEL = mn.ModelConfig(
    width=32, ffn=64, vocab=96, layers=2, heads=4, kv_heads=2, head_dim=8, rope=mn.RopeConfig(theta=1e4),
    dtype="float32",
)  # fmt: skip
YAML = """
width: 32
ffn: 64
vocab: 96
layers: 2
heads: 4
kv_heads: 2
head_dim: 8
dtype: float32
"""
LLAMA_1B, LLAMA_8B = (
    mn.from_yaml(mn.ModelConfig, f"configs/model/{name}.yaml") for name in ("llama-3.2-1b", "llama-3-8b")
)
H100 = "NVIDIA H100 80GB HBM3"
TINY = [
    *("--contexts", "[48, 1000000000, 16]", "--chunks", "[32, 16]", "--new_tokens", "9", "--rounds", "2"),
    *("--serve.page_tokens", "8", "--serve.chunk_tokens", "16", "--serve.chunk_buckets", "[16]"),
    *("--matmul_size", "64", "--copy_bytes", "65536", "--sample_ms", "0.1", "--profile_ticks", "2"),
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.yaml"
    path.write_text(YAML)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_file):
    """(exit code, record, folder) of a whole run."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clocks, "REST_S", 0)
        files = ["--out", str(folder / "a.json"), "--plot", str(folder / "a.png"), "--check", "--profile"]
        code = bench_engine.main([*TINY, "--models", f"[{model_file}]", *files])
    return code, json.loads((folder / "a.json").read_text()), folder


def by(rows, *cells):
    return [tuple(r.get(cell) for cell in cells) for r in rows]


def test_record_of_a_whole_run(run):
    code, made, _ = run
    rows = {name: [r for r in made["rows"] if r["name"] == name] for name in {r["name"] for r in made["rows"]}}
    assert code == 0 and "causality" in made["convention"] and made["ceilings"]["matmul_tflops_at_the_end"] > 0
    grid = [("tiny", context, chunk) for context in (16, 48) for chunk in (32, 16, "adaptive")]
    for name in (record.TTFT, record.TBT, "TBT p99", "prefill rate of a device", "MFU", "MBU"):
        assert by(rows[name], "shape", "context", "chunk") == grid and all(r["value"] > 0 for r in rows[name])
    assert by(rows[record.TTFT], "chunks", "largest_chunk")[:2] == [(1, 16), (1, 16)]
    assert by(rows[record.TTFT], "chunks", "largest_chunk")[3:5] == [(2, 32), (3, 16)]
    assert all(r["runs"] == 2 for r in rows[record.TTFT]) and all(r["tokens"] == 16 for r in rows[record.TBT])
    assert by(rows[record.RATIO], "context", "chunk", "over") == [
        (c, k, 32) for c in (16, 48) for k in (16, "adaptive")
    ]
    assert by(rows["host time p50"], "tick") == [("chunk",), ("decode",)] * 6
    kv_gib = rows["keys and values"][0]["value"]
    assert kv_gib == pytest.approx(7 * 8 * MODEL.kv_bytes_per_token(4) / 2**30, rel=1e-3)  # 48 + 9 - 1 tokens
    assert rows["making programs"][0]["value"] > 0 and not any("must" in r for r in made["rows"])
    absent = {(r.get("context"), r.get("what"), r.get("tick")): r["reason"] for r in made["absent"]}
    assert "GiB of a device" in absent.pop((1_000_000_000, None, None))
    assert set(absent.values()) == {"the profiler saw no GPU", "the device does not count its memory"}
    assert len(absent) == 5  # two contexts, two kinds of tick, one memory


def test_picture_is_drawn_and_drawn_again(run):
    pytest.importorskip("matplotlib")
    _, made, folder = run
    first = (folder / "a.png").read_bytes()
    assert bench_engine.main(["--redraw", f"[{folder / 'a.json'}]", "--plot", str(folder / "b.png")]) == 0
    assert first.startswith(b"\x89PNG") and (folder / "b.png").read_bytes() == first
    longer = made | {"config": made["config"] | {"models": ["other.yaml"]}}
    both = bench_engine_figure.together([made, longer])
    assert len(both["rows"]) == 2 * len(made["rows"]) and both["config"]["models"][1] == "other.yaml"
    with pytest.raises(ValueError, match="records of"):
        bench_engine_figure.together([made, made | {"device": {"kind": H100}}])
    made["config"]["models"] = ["configs/model/llama-3-8b.yaml"]
    rows = [r | {"shape": "llama-3-8b"} for r in made["rows"]] + [
        results.row(record.TBT, 25.0, "ms", shape="llama-3-8b", context=393_216, cache="filled")
    ]
    left, right = bench_engine_figure.figure(made | {"rows": rows}).axes
    ours = [f"ours, chunk {chunk}" for chunk in (32, 16, "adaptive")]
    others = [record.RIVAL, "floor of this run's matmul or copy"]
    assert [line.get_label() for line in left.get_lines()] == [*ours, *others]
    assert [line.get_label() for line in right.get_lines()] == [*ours, "ours, cache filled", *others]
    by_label = {line.get_label(): np.array(line.get_ydata()) for line in right.get_lines()}
    assert np.isnan(by_label["ours, cache filled"]).tolist() == [True, True, False]  # no line across what others have
    assert np.isnan(by_label[ours[0]]).tolist() == [False, False, True]
    vllm = right.get_lines()[-2]
    assert list(vllm.get_xdata()) == [8_192, 32_768, 131_072, 393_216] and vllm.get_ydata()[-1] == 23.9


def test_decode_only_and_a_run_out_of_time(model_file, tmp_path, monkeypatch):
    monkeypatch.setattr(clocks, "REST_S", 0)
    args = [*TINY, "--models", f"[{model_file}]", "--decode_only", "--out", str(tmp_path / "a.json")]
    assert bench_engine.main([*args, "--chunks", "[16]"]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    found = [r for r in rows if r["name"] == record.TBT]
    assert by(found, "context", "cache", "tokens") == [(16, "filled", 16), (48, "filled", 16)]
    assert not [r for r in rows if r["name"] in (record.TTFT, record.RATIO)]
    assert bench_engine.main([*args, "--seconds", "0"]) == 0
    made = json.loads((tmp_path / "a.json").read_text())
    assert not made["rows"] and made["absent"][-1]["reason"] == "no time left"


def test_a_planted_prompt_stands_where_a_prefilled_one_does():
    """After a real prefill the same prompt, planted onto the pages it was given, decodes the same tokens."""
    mesh = make_mesh(mn.MeshSpec(kvp=2, spp=2))
    serve = mn.ServeConfig(
        page_tokens=8, pool_pages=8, private_rows=1, shared_rows=1, chunk_tokens=16, chunk_buckets=(16,),
        chunking="fixed", span_tokens=32,
    )  # fmt: skip
    executor = TimedExecutor(MODEL, init(MODEL, mesh, np.float32), serve, mesh)  # compiles only what it meets
    engine, prompt = TimedEngine(executor, serve, None), random_prompt(50, MODEL.vocab, seed=3)
    assert prompt.max() < MODEL.vocab and len(set(prompt.tolist())) > 10
    handle = engine.submit(mn.Request("real", prompt, 6, stop_ids=()))
    real = handle.result().tokens
    engine.drain()
    blank = executor._state.cache.page_table * 0
    again = TimedEngine(executor, serve, None)  # grants the same pages; its devices are told nothing of them
    executor._state = executor._state.replace(cache=executor._state.cache.replace(page_table=blank))
    sequence = plant(again, prompt, 6, 49)
    while not sequence.finished:
        again.timed_tick()
    again.drain()
    assert sequence.tokens == real and len(set(real)) > 1
    measured = run_prompt(engine, prompt, 6, planted=False)
    assert measured.chunks == (16, 16, 16, 2) and len(measured.tbt_s) == 5 and measured.ttft_s > 0
    assert len(measured.host_s["chunk"]) == 4 and len(measured.host_s["decode"]) == 5
    fill(executor)
    assert np.asarray(executor._state.cache.kv).std(axis=(2, 3, 4, 5)).min() > 0.3  # every page of every layer


# What is counted.


def test_operations_and_bytes_are_those_of_the_rivals_record():
    """TFLOP/s and floors as measured for vLLM: the same convention."""
    for model, context, ttft_s, tflops in ((LLAMA_8B, 131_072, 10.4, 608), (LLAMA_1B, 524_288, 39.7, 479)):
        assert record.prefill_flops(model, context) / ttft_s / 1e12 == pytest.approx(tflops, rel=0.01)
    ceilings = dict(matmul_tflops=779, copy_tb_per_s=3.02)
    assert record.floors(LLAMA_8B, 131_072, ceilings, 1) == pytest.approx((8.2, 10.7), rel=0.015)
    assert record.floors(LLAMA_8B, 393_216, ceilings, 1) == pytest.approx((59.5, 22.0), rel=0.015)
    assert record.floors(LLAMA_1B, 1_048_576, ceilings, 1) == pytest.approx((95, 12.2), rel=0.015)
    assert record.floors(LLAMA_1B, 131_072, ceilings, 2) == pytest.approx((0.9, 1.1), rel=0.03)


def test_layer_weights_are_all_but_norms_and_tables():
    norms = MODEL.layers * 2 * MODEL.width + MODEL.width
    assert record.layer_weights(MODEL) == MODEL.weights - norms - 2 * MODEL.vocab * MODEL.width


def test_bounds_are_those_of_one_hopper():
    def limits(name, shape, context=0, kind=H100, tp=1, **where):
        return tuple(record.bounds(name, kind, mn.MeshSpec(tp=tp), shape=shape, context=context, **where).values())

    assert limits(record.TTFT, "llama-3-8b", 131_072, chunk=8192) == ("<= 10.2", "<= 9.4")
    assert limits(record.TTFT, "llama-3.2-1b", 524_288, chunk="adaptive") == ("<= 38.5", "<= 34")
    assert limits(record.TBT, "llama-3.2-1b", 8_192, cache="filled") == ("<= 1.6", "<= 1.1")
    assert limits(record.RATIO, "llama-3-8b", 393_216, chunk=504, over=8184) == ("<= 1.12", "<= 1.06")
    assert limits(record.TBT, "qwen2.5-0.5b", 10_000_000, kind="NVIDIA H200") == ("<= 34", "<= 30.5")
    assert limits(record.PEAK, "llama-3-8b") == ("<= 4", "<= 2")
    assert not limits(record.TTFT, "llama-3-8b", 131_072, chunk=512)
    assert not limits(record.TBT, "qwen2.5-0.5b", 10_000_000)
    assert not limits(record.TBT, "llama-3-8b", 8_192, kind="cpu")
    assert not limits(record.TBT, "llama-3-8b", 8_192, tp=2)


def test_the_longest_contexts_of_the_targets_fit_their_device(monkeypatch):
    """384K of shape B in an H100, 10M of the Qwen shape in an H200: what `plan` keeps for activations is theirs too."""
    qwen = mn.from_yaml(mn.ModelConfig, "configs/model/qwen2.5-0.5b.yaml")
    config, absent = command_line.read(BenchEngineConfig, ["--config_path", "configs/bench_engine.yaml"]), []
    bench = SimpleNamespace(leave_out=lambda reason, **where: absent.append(where["context"]))
    for gib, model, context, too_long in ((79.1, LLAMA_8B, 393_216, 524_288), (139.7, qwen, 10_000_000, 12_000_000)):
        monkeypatch.setattr(bench_engine, "device_bytes", lambda gib=gib: int(0.94 * gib * 2**30))
        one = bench_engine.replace(config, contexts=(too_long, context))
        assert bench_engine.contexts_that_fit(one, bench, model, "shape") == [context]
    assert absent == [524_288, 12_000_000]


# The profile.


def test_account_of_a_tick():
    events = [
        ("nvjet_tst_64x8_gemm", 100.0, 50.0), ("attend_items_mosaic_gpu_kernel", 160.0, 100.0),
        ("loop_add_fusion", 150.0, 5.0), ("MemcpyD2D", 200.0, 100.0),
        ("merge_partials_mosaic_gpu_kernel", 400.0, 100.0),
        ("ncclDevKernel_AllReduce_Sum", 500.0, 1500.0),
    ]  # fmt: skip
    found = profile.account(events, ticks=2)
    assert found.total_us == pytest.approx(0.95)
    us = {"matmul": 0.025, "attend": 0.05, "other fusions": 0.0025, "copies": 0.05, "merge partials": 0.05}
    assert found.family_us == pytest.approx(us | {"collectives": 0.75, "idle": (5 + 100) / 2e3})
    assert next(iter(found.kernel_us)) == "ncclDevKernel_AllReduce_Sum"
    assert profile.account([], 2) is None


def test_events_of_the_first_gpu():
    def plane(name, *lines):
        event = SimpleNamespace(name="k", start_ns=1.0, duration_ns=2.0)
        return SimpleNamespace(name=name, lines=[SimpleNamespace(name=line, events=[event]) for line in lines])

    data = SimpleNamespace(planes=[plane("/host:CPU", "Stream #1"), plane("/device:GPU:0", "Stream #7", "XLA Ops")])
    assert profile.device_events(data) == [("k", 1.0, 2.0)]
    assert profile.device_events(SimpleNamespace(planes=[])) == []


def test_rows_of_a_profile():
    found = bench_engine.Found(None)
    bench = record.Bench(mn.MeshSpec(), found, {}, lambda: None, 0.0)
    made = profile.account([("gemm", 0.0, 3e3), ("attend_items", 4e3, 1e3)], ticks=1)
    profile.rows_of(bench, {"decode": made, "chunk": None}, shape="tiny", context=16)
    shares = {r["family"]: r["share"] for r in found.rows if r["name"] == "device time of family"}
    assert shares == {"matmul": 0.6, "attend": 0.2, "idle": 0.2} and found.rows[0]["value"] == 5.0
    assert by(found.absent, "tick", "reason") == [("chunk", "the profiler saw no GPU")]


def test_refuses(capsys):
    for args, reason in (
        (["--redraw", "[a.json]"], "needs --plot"),
        (["--chunks", "[]"], "must be positive"),
        (["--new_tokens", "2"], "must be 8 or more"),
    ):
        with pytest.raises(SystemExit):
            bench_engine.main(args)
        assert reason in capsys.readouterr().err
    assert jax.devices()  # nothing was started for them


def test_pool_holds_a_request_alone_or_in_all_groups():
    serve = mn.ServeConfig(page_tokens=8, span_tokens=32)
    pages = [[pool_pages(serve, mn.MeshSpec(kvp), tokens) for tokens in (1, 32, 33, 57)] for kvp in (1, 2)]
    assert pages == [[1, 4, 5, 8], [1, 4, 3, 4]]


def test_plan_agrees_on_bytes():
    """What is counted per device is what `plan` counts, but for page tables and activations."""
    found = bench_engine.needed_bytes(LLAMA_8B, bench_engine.BenchEngineConfig().serve_for(512), mn.MeshSpec(), 131_072)
    planned = plan(LLAMA_8B, mn.HardwareConfig(), mn.MeshSpec(), 131_072)
    both = planned.weight_bytes_per_device + planned.kv_bytes_per_device
    assert both < found < both + 0.2 * 2**30
