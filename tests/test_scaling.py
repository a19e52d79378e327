"""Scaling at tiny sizes on virtual devices: every layout measured or refused, the same tokens, and what follows."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import mnemosyne_jax as mn
from experiments import clocks, command_line, results, scaling, scaling_figure, scaling_ring, scaling_tokens
from experiments import scaling_record as record
from experiments.bench_engine_record import TBT, TTFT
from experiments.kernel_record import Found
from experiments.scaling import ScalingConfig
from experiments.scaling_record import LayoutBench
from experiments.scaling_tokens import CompareConfig

YAML = "{width: 32, ffn: 64, vocab: 96, layers: 2, heads: 4, kv_heads: 2, head_dim: 8, dtype: float32}"
TINY = [
    *(
        "--virtual_devices",
        "8",
        "--prefills",
        "[160]",
        "--rings",
        "[160, 161]",
        "--decodes",
        "[200, 1000000000]",
        "--rounds",
        "1",
    ),
    *("--chunks", "{1: 64, 2: 32}", "--new_tokens", "8", "--serve.page_tokens", "8", "--serve.span_tokens", "64"),
    *("--serve.private_rows", "2", "--serve.shared_rows", "1", "--serve.private_chunks", "1"),
    *("--matmul_size", "64", "--copy_bytes", "65536", "--sample_ms", "0.1"),
    *("--compare.prompt_tokens", "150", "--compare.new_tokens", "6", "--compare.chunk_tokens", "64"),
    *("--compare.span_tokens", "64", "--compare.dtypes", "[float32]"),
]
ONE, H200 = mn.MeshSpec(), "NVIDIA H200"
QWEN, LLAMA_8B = ("qwen2.5-0.5b", 10_000_000), ("llama-3-8b", 1_048_576)


def layout(*names):
    return "[" + ", ".join(f"configs/layouts/{name}.yaml" for name in names) + "]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(exit code, record, folder) of a whole run."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "tiny.yaml").write_text(YAML)
    (folder / "spp16.yaml").write_text("mesh: {spp: 16}")
    layouts = layout("one", "kvp2", "spp2").replace("]", f", {folder / 'spp16.yaml'}]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clocks, "REST_S", 0)
        patch.setattr(scaling_tokens, "SMALL", dataclasses.replace(scaling_tokens.SMALL, layers=2))  # compiled sooner
        files = ["--model", str(folder / "tiny.yaml"), "--out", str(folder / "a.json"), "--plot", str(folder / "a.png")]
        code = scaling.main([*TINY, *files, "--layouts", layouts, "--check"])
    return code, json.loads((folder / "a.json").read_text()), folder


def test_record_of_a_whole_run(run):
    code, made, _ = run
    rows = {name: [r for r in made["rows"] if r["name"] == name] for name in {r["name"] for r in made["rows"]}}
    assert code == 0 and "fastest layout" in made["convention"]
    meshes = [str(mn.MeshSpec()), str(mn.MeshSpec(spp=2)), str(mn.MeshSpec(kvp=2))]
    assert [(r["mesh"], r["chunk"], r["context"], r["chunks"]) for r in rows[TTFT]] == [
        (meshes[0], 64, 160, 3), (meshes[1], 32, 160, 5), (meshes[2], 64, 160, 3),
    ]  # fmt: skip
    filled = [r for r in rows[TBT] if r.get("cache") == "filled"]
    assert [(r["mesh"], r["context"], r["devices"]) for r in filled] == [
        (meshes[0], 200, 1),
        *((m, 200, 2) for m in meshes[1:]),
    ]
    assert [r.get("placement") for r in rows[TTFT]] == [None, None, "stripe"]
    assert [(r["mesh"], r["against"]) for r in rows[record.EFFICIENCY]] == [(m, meshes[0]) for m in meshes[1:]]
    one, spp2 = rows[TTFT][0]["value"], rows[TTFT][1]["value"]
    assert rows[record.EFFICIENCY][0]["value"] == pytest.approx(one / (2 * spp2), rel=1e-2)
    assert len(rows[record.PENALTY]) == len(rows[record.TIME_CUT]) == 1 and len(rows[record.LEAST_TTFT]) == 2
    absent = {(r["mesh"], r.get("context")): r["reason"] for r in made["absent"]}
    assert absent.pop(("kvp 1 x spp 16 x tp 1", None)) == (
        "mesh: got 'kvp 1 x spp 16 x tp 1', needs 16 devices, this run has 8"
    )
    assert absent.pop((meshes[2], 161)) == "must be a multiple of 2 pages of 8 tokens"
    (ring,) = rows[scaling_ring.RING]
    assert (ring["mesh"], ring["context"]) == (meshes[2], 160) and ring["value"] > 0
    assert set(absent) == {(mesh, 1_000_000_000) for mesh in meshes}
    assert all("GiB of a device" in reason for reason in absent.values())


def test_tokens_are_those_of_one_device(run):
    same = [r for r in run[1]["rows"] if r["name"] == scaling_tokens.SAME_TOKENS]
    apart = [r for r in run[1]["rows"] if r["name"] == scaling_tokens.LOGIT_DIFFERENCE]
    assert [(r["spp"], r["kvp"]) for r in same] == [(2, 1), (1, 2)] and len(apart) == 2
    assert all(r["value"] == 1 and r["must"] == "== 1" and r["distinct"] > 2 for r in same)
    assert all(r["value"] <= 1e-4 for r in apart)


def test_another_token_or_logit_is_no_success(monkeypatch):
    def sabotaged(config, serve, mesh, dtype, weights):
        wrong = mesh.devices > 1
        return [5, 6, 7 + (mesh.spp > 1)], np.array([4.0, 4.0 + 0.25 * wrong * (mesh.tp > 1)])

    monkeypatch.setattr(scaling_tokens, "answers", sabotaged)
    found = Found(None)
    benches = [
        LayoutBench(mesh, found, {}, lambda: None, float("inf"), "stripe")
        for mesh in (ONE, mn.MeshSpec(kvp=2), mn.MeshSpec(spp=2), mn.MeshSpec(tp=2))
    ]
    scaling_tokens.compare(CompareConfig(), mn.ServeConfig(), benches)
    missed = [(r["name"], r["dtype"], r["mesh"]) for r in found.rows if not results.keeps(r["value"], r["must"])]
    assert missed == [
        (scaling_tokens.SAME_TOKENS, "float32", "kvp 1 x spp 2 x tp 1"),
        (scaling_tokens.LOGIT_DIFFERENCE, "float32", "kvp 1 x spp 1 x tp 2"),
        (scaling_tokens.LOGIT_DIFFERENCE, "bfloat16", "kvp 1 x spp 1 x tp 2"),
    ]
    for mesh in (ONE, *(mn.MeshSpec(*sizes) for sizes in itertools.permutations((2, 2, 2)))):
        scaling_tokens.SMALL.refuse_mesh(mesh)
    for axis in ("kvp", "spp", "tp"):
        scaling_tokens.SMALL.refuse_mesh(mn.MeshSpec(**{axis: 8}))


# What follows from made-up measurements.


def ttft(seconds, work=LLAMA_8B, chunk=4088, placement="stripe", **axes):
    mesh = mn.MeshSpec(**axes)
    place = dict(placement=placement) if mesh.kvp > 1 else {}
    sizes = dict(kvp=mesh.kvp, spp=mesh.spp, tp=mesh.tp, mesh=str(mesh), devices=mesh.devices)
    return results.row(TTFT, seconds, "s", shape=work[0], context=work[1], chunk=chunk, **sizes, **place)


def tbt(ms, work=QWEN, **where):
    row = ttft(ms, work, **where) | {"name": TBT, "unit": "ms", "cache": "filled"}
    return {key: cell for key, cell in row.items() if key != "chunk"}


def numbers(rows, name, kind=H200):
    """{mesh: (value, must, aim, against)}"""
    found = [r for r in record.derived(rows, kind) if r["name"] == name]
    return {
        mn.MeshSpec(r["kvp"], r["spp"], r["tp"]): tuple(r.get(key) for key in ("value", "must", "aim", "against"))
        for r in found
    }


def test_efficiency_is_against_the_best_of_the_fewest_devices():
    rows = [ttft(400, spp=2), ttft(410, tp=2), ttft(395, spp=2, chunk=2040), ttft(200, spp=4), ttft(80, spp=2, tp=4)]
    rows += [tbt(900, LLAMA_8B, spp=2), ttft(7, ("llama-3-8b", 131_072)), ttft(4, ("llama-3-8b", 131_072), spp=2)]
    base, spp4, mixed = str(mn.MeshSpec(spp=2)), mn.MeshSpec(spp=4), mn.MeshSpec(spp=2, tp=4)
    one, two = mn.MeshSpec(), mn.MeshSpec(spp=2)
    assert numbers(rows, record.EFFICIENCY) == {
        spp4: (0.9875, ">= 0.95", None, base), mixed: (1.234, None, None, base), two: (0.875, None, None, str(one)),
    }  # fmt: skip
    assert [bound for _, bound, _, _ in numbers(rows, record.EFFICIENCY, "cpu").values()] == [None] * 3
    least = {str(mesh): (value, must) for mesh, (value, must, _, _) in numbers(rows, record.LEAST_TTFT).items()}
    assert least[str(mixed)] == (80, "<= 62") and least[str(spp4)] == (200, None)
    half = [ttft(160, ("llama-3-8b", 524_288)), ttft(82, ("llama-3-8b", 524_288), spp=2)]
    assert numbers(half, record.EFFICIENCY) == {two: (0.9756, ">= 0.9", ">= 0.97", str(one))}


def test_decodes_are_against_the_pipeline_of_the_fewest_stages():
    rows = [tbt(30), tbt(17, kvp=2), tbt(9, kvp=4), tbt(33, spp=8), tbt(20, tp=2), tbt(9, QWEN, kvp=2, spp=2)]
    one, two, four = str(ONE), mn.MeshSpec(kvp=2), mn.MeshSpec(kvp=4)
    cut = numbers(rows, record.TIME_CUT)
    assert cut[two] == (0.4333, ">= 0.4", ">= 0.45", one) and cut[four] == (0.7, ">= 0.68", None, one)
    assert cut[mn.MeshSpec(tp=2)][0] == 0.3333 and len(cut) == 4
    assert numbers(rows, record.PENALTY) == {mn.MeshSpec(spp=8): (0.1, "<= 0.1", None, one)}
    assert numbers(rows, record.SPEED_UP)[two][0] == 1.765 and len(numbers(rows, record.SPEED_UP)) == 5
    without_one = numbers([row for row in rows if row["mesh"] != one], record.TIME_CUT)
    assert without_one[two][3] == str(mn.MeshSpec(spp=8))
    assert not record.derived([tbt(17, kvp=2)], H200)
    llama = ("llama-3.2-1b", 1_048_576)
    assert numbers([tbt(15, llama), tbt(9, llama, kvp=2)], record.TIME_CUT)[two][1:3] == (">= 0.33", ">= 0.42")


def made_up(kind=H200, **changes):
    rows = [ttft(100), ttft(55, spp=2), ttft(60, tp=2), ttft(70, kvp=2), tbt(30), tbt(17, kvp=2), tbt(9, kvp=2, spp=2)]
    made = {"device": {"kind": kind}, "versions": {"jax": "0"}, "command": "a", "absent": [{"by": "ours"}]}
    return made | {"rows": rows + record.derived(rows, kind)} | changes


def test_records_are_joined_and_placements_compared():
    grown = [ttft(77, kvp=2, placement="grow"), tbt(17, kvp=2, placement="grow")]
    made = record.joined([made_up(), made_up(command="b", rows=grown)])
    assert made["commands"] == ["a", "b"] and len(made["absent"]) == 2
    compared = {r["name"]: r["value"] for r in made["rows"] if r["name"] in record.GROWING.values()}
    assert compared == {record.GROWING[TTFT]: 1.1, record.GROWING[TBT]: 1.0}
    assert sum(r["name"] == record.EFFICIENCY for r in made["rows"]) == 3  # made anew, not taken over
    assert record.joined([made, made_up()])["commands"] == ["a", "b", "a"]
    with pytest.raises(ValueError, match="records of NVIDIA H200 and cpu"):
        record.joined([made_up(), made_up("cpu")])


def test_picture(run):
    pytest.importorskip("matplotlib")
    folder = run[2]
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    files = ["--join", f"[{folder / 'a.json'}]", "--plot", str(folder / "b.png"), "--out", str(folder / "b.json")]
    assert scaling.main([*files, "--check"]) == 0
    assert (folder / "b.png").read_bytes() == (folder / "a.png").read_bytes()
    assert json.loads((folder / "b.json").read_text())["rows"] == run[1]["rows"]
    left, right = scaling_figure.figure(made_up()).axes  # neither shape has both times
    assert [axes.get_title().split(": ")[1] for axes in (left, right)] == [TTFT, TBT]
    labels = [line.get_label() for line in left.get_lines() if not line.get_label().startswith("_")]
    assert labels == [f"{axis}, 1,048,576" for axis in ("spp", "kvp", "tp")]
    kvp, cross, ideal = right.get_lines()
    assert list(kvp.get_ydata()) == [30, 17] and list(ideal.get_ydata()) == [30, 15, 7.5]
    assert list(cross.get_xdata()) == [4] and right.texts[0].get_text() == "kvp 2 x spp 2"


# What is asked for.


def test_there_is_a_layout_for_every_mesh_of_up_to_eight_devices():
    sizes = (1, 2, 4, 8)
    wanted = {mn.MeshSpec(*axes) for axes in itertools.product(sizes, repeat=3) if np.prod(axes) <= 8}
    config = command_line.read(ScalingConfig, ["--config_path", "configs/scaling.yaml"])
    meshes = config.meshes()
    assert len(meshes) == len(wanted) == 20 and set(meshes) == wanted
    assert [mesh.devices for mesh in meshes] == sorted(mesh.devices for mesh in meshes)
    for file in Path("configs/layouts").glob("*.yaml"):
        mesh = mn.from_yaml(scaling.Layout, file).mesh
        words = [f"{axis}{getattr(mesh, axis)}" for axis in ("kvp", "spp", "tp") if getattr(mesh, axis) > 1]
        assert file.stem == ("_".join(words) or "one")


def test_a_tick_has_whole_tiles_of_rows_on_every_layout():
    config = command_line.read(ScalingConfig, ["--config_path", "configs/scaling.yaml"])
    rows = {}
    for mesh in config.meshes():
        serve = config.work_on(mesh, config.prefills, False).serve
        rows[mesh.spp] = serve.chunk_tokens + serve.slots(mesh)
        assert serve.slots(mesh) == 8 and rows[mesh.spp] % 128 == 0
    assert rows == {1: 8192, 2: 4096, 4: 4096, 8: 2048}


def test_what_is_refused_or_out_of_time_is_absent(run, tmp_path, monkeypatch):
    monkeypatch.setattr(clocks, "REST_S", 0)
    args = ["--model", str(run[2] / "tiny.yaml"), "--seconds", "0", "--compare.prompt_tokens", "0"]
    assert (
        scaling.main([*TINY, *args, "--layouts", layout("one", "spp2", "spp4"), "--out", str(tmp_path / "a.json")]) == 0
    )
    made = json.loads((tmp_path / "a.json").read_text())
    reasons = {left_out["mesh"]: left_out["reason"] for left_out in made["absent"] if left_out.get("context") is None}
    refused = {str(mn.MeshSpec(spp=4)): "mesh.spp: got 4, must divide layers = 2"}
    assert not made["rows"]
    assert reasons == {str(mesh): "no time left" for mesh in (ONE, mn.MeshSpec(spp=2))} | refused


def test_refuses(capsys):
    for args, reason in (
        (["--join", "[a.json]"], "join: got ['a.json'], needs --out FILE.json or --plot FILE.png"),
        (["--chunks", "{2: 64}"], "chunks: got {2: 64}, must be positive, and say what one stage takes"),
        (["--serve.shared_rows", "8"], "serve.private_rows: got 8, must be more than serve.shared_rows"),
    ):
        with pytest.raises(SystemExit):
            scaling.main(args)
        assert reason in capsys.readouterr().err, reason
