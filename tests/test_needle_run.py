"""The needle command at small sizes: it finds all keys on a mesh, loses those that it must, and says which and how."""

import json

import jax
import numpy as np
import pytest

import mnemosyne_jax as mn
from experiments import needle
from experiments import needle_record as record
from mnemosyne_jax import needle as model

TOKENS, CHUNK, DEPTHS = 3000, 512, (0.1, 0.3, 0.5, 0.7, 0.9)
SMALL = [
    *("--config_path", "configs/needle.yaml", "--tokens", str(TOKENS), "--values", "3", "--check"),
    *("--serve.chunk_tokens", str(CHUNK), "--serve.page_tokens", "64", "--serve.span_tokens", "1024"),
]
ACROSS = ["--first_position", str(record.FLOAT32_EXACT - TOKENS // 2)]  # keys on both sides of 2^24
FLOAT32 = ["--serve.rope_precision", "hf_float32"]


@pytest.fixture(scope="module")
def engines():
    return {}


@pytest.fixture
def run(engines, monkeypatch, tmp_path):
    """Runs the command: (exit code, its rows by name). Engines of one mesh and precision are made once."""

    def once(config):
        key = str(config.mesh), config.serve.rope_precision
        if key not in engines:
            engines[key] = make_engine(config)
        return engines[key]

    def run(*args):
        out = tmp_path / "a.json"
        code, rows = needle.main([*SMALL, *args, "--out", str(out)]), {}
        for row in json.loads(out.read_text())["rows"]:
            rows.setdefault(row["name"], []).append(row)
        return code, rows

    make_engine = needle.make_engine
    monkeypatch.setattr(needle, "make_engine", once)
    return run


def cells(rows, *keys):
    return [tuple(row.get(key) for key in keys) for row in rows]


# Keys.


def test_finds_every_key_on_a_mesh(run, tmp_path, monkeypatch, capsys):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    monkeypatch.setattr(needle, "SAY_EVERY_S", 0.0)
    picture = tmp_path / "a.png"
    code, rows = run("--mesh.kvp", "2", "--mesh.spp", "2", "--virtual_devices", "4", "--plot", str(picture))
    assert code == 0
    every = [row for named in rows.values() for row in named]
    assert set(cells(every, "shape", "chunk", "mesh")) == {("needle", CHUNK, "kvp 2 x spp 2 x tp 1")}
    assert cells(rows["found"], "depth", "value", "must") == [(depth, 1, "== 1") for depth in DEPTHS]
    assert min(row["margin"] for row in rows["found"]) > 23

    prompt, expected = model.prompt(TOKENS, DEPTHS, values=3)
    ((generated,),) = cells(rows["generated"], "value")
    assert generated == expected and len(rows["argmax at the tail"]) == len(DEPTHS)
    for found, tail in zip(rows["found"], rows["argmax at the tail"], strict=True):
        key, last = found["position"], found["depth"] == DEPTHS[-1]
        assert abs(key - TOKENS * found["depth"]) < 30 and prompt[key + 4] == model.STOP
        assert tail["value"] == prompt[key + 1 : key + 2 if last else key + 5].tolist()

    ttft_s = rows["TTFT"][0]["value"]
    assert rows["TTFT"][0]["chunks"] == 6 and rows["TBT p50"][0]["tokens"] == 3
    assert rows["prefill"][0]["value"] == pytest.approx(TOKENS / ttft_s, rel=0.01)
    tflops = 4 * 2 * 2 * 64 * TOKENS * (TOKENS + 1) / 2 / ttft_s / 4 / 1e12
    assert rows["attention rate of a device"][0]["value"] == pytest.approx(tflops, rel=0.01)
    assert [row["context"] for row in rows["time to context"]] == [512, 1024, 1536, 2048, 2560, 3000]
    times = [row["value"] for row in rows["time to context"]]
    assert times == sorted(times) and times[-1] == pytest.approx(ttft_s, rel=0.1)
    assert {"weights", "keys and values", "temporaries of a tick", "host time p50", "run"} <= rows.keys()
    text = capsys.readouterr().out
    for words in ("ready in", "512 of 3,000 tokens", "s to go", "found: depth 0.9", "TFLOP/s", "must == 1 met: found"):
        assert words in text, words

    drawn = picture.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    picture.unlink()
    assert needle.main(["--redraw", str(tmp_path / "a.json"), "--plot", str(picture)]) == 0
    assert picture.read_bytes() == drawn


def test_exact_angles_find_keys_past_2_to_the_24(run, capsys):
    for expect, code, must in (("find", 0, "== 1"), ("fail", 1, "== 0")):
        got, rows = run(*ACROSS, "--expect", expect)
        assert got == code
        assert cells(rows["found"], "value", "must") == [(1, "== 1")] * 3 + [(1, must)] * 2
        before, after = rows["found"][2]["position"], rows["found"][3]["position"]
        assert before + 4 <= record.FLOAT32_EXACT < after
    assert "must == 0 MISSED: found" in capsys.readouterr().out


def test_float32_angles_lose_them_and_no_others(run, capsys):
    for expect, code, must in (("fail", 0, "== 0"), ("find", 1, "== 1")):
        got, rows = run(*ACROSS, *FLOAT32, "--expect", expect)
        assert got == code
        assert cells(rows["found"], "value", "must") == [(1, "== 1")] * 3 + [(0, must)] * 2
    ((generated, expected),) = cells(rows["generated"], "value", "expected")
    assert generated != expected
    assert capsys.readouterr().out.count("NOT FOUND: depth") == 4
    code, rows = run("--first_position", str(record.FLOAT32_EXACT + 1), *FLOAT32, "--expect", "fail")
    assert code == 0 and cells(rows["found"], "value", "must") == [(0, "== 0")] * 5


def test_what_is_wrong_is_not_found(run, monkeypatch):
    """One logit at the tail, or one token after it, is enough."""

    def sabotaged(engine, request, end_s):
        course = serve(engine, request, end_s)
        first = min(course.sequence.logits)
        course.sequence.logits[first + 1] = np.roll(course.sequence.logits[first + 1], 1)
        course.sequence.tokens[1] += 1
        return course

    serve = needle.run
    monkeypatch.setattr(needle, "run", sabotaged)
    code, rows = run()
    assert code == 1 and cells(rows["found"], "value") == [(0,), (1,), (1,), (1,), (0,)]


def test_gives_up_in_time(run, capsys):
    """What expects keys to be lost is not content with an answer that never came."""
    code, rows = run(*ACROSS, "--expect", "fail", "--seconds", "0")
    assert code == 1 and not rows.keys() & {"found", "TTFT"}
    assert cells(rows["answered"], "value", "reason") == [(0, "cancelled")]
    assert "must == 1 MISSED: answered" in capsys.readouterr().out
    assert run()[0] == 0  # and the engine serves on


# What is counted and said.


def test_operations_are_those_of_the_issue():
    facts = model.config()
    assert record.attention_flops(facts, 0, 10_000_000) == pytest.approx(5.12e16, rel=1e-3)
    assert record.attention_flops(facts, 0, 20_000_000) == pytest.approx(2.05e17, rel=1e-3)
    pairs = sum(token + 1 for token in range(70, 100))
    assert record.attention_flops(facts, 70, 100) == 4 * 2 * 2 * 64 * pairs
    parts = [record.attention_flops(facts, *part) for part in ((0, 70), (70, 100))]
    assert sum(parts) == record.attention_flops(facts, 0, 100)


def test_progress_foresees_the_rest():
    """At a constant attention rate the second half of a prompt takes three times as long as the first."""
    said = record.progress(model.config(), 8_000_000, record.Point(0.0, 0), record.Point(50.0, 4_000_000))
    assert said == "4,000,000 of 8,000,000 tokens in 50 s: 80,000 tokens/s, attention 163.8 TFLOP/s, 150 s to go"


def test_points_of_a_long_course_are_thinned():
    rows = []
    found = type("Found", (), dict(add=lambda self, *cells, **where: rows.append((*cells, where))))()
    bench = record.Bench(mn.MeshSpec(), found, {}, lambda: None, 0.0)
    reached = [record.Point(float(n * n), 1000 * n) for n in range(2001)]
    record.course_rows(bench, record.Course(None, reached, []), model.config(), context=0)
    assert len(rows) == record.MOST_POINTS and rows[-1][1] == 4e6 and rows[-1][-1]["context"] == 2_000_000
    contexts = [where["context"] for *_, where in rows]
    assert contexts == sorted(set(contexts))
    rates = [where["attention_tflops"] for *_, where in rows]
    assert np.ptp(rates) < 1e-3 * np.mean(rates)  # time is quadratic in tokens: one rate


def test_refuses(capsys):
    for args, reason in (
        (["--expect", "fail"], "expect: got 'fail', needs a key past position 16777216: the last ends at"),
        (["--tokens", "2000000000"], "tokens: got 2000000000, needs 1908.3 GiB of a device"),
        (["--tokens", "20"], "length: got 20, must be from"),
        (["--depths", "[0.5, 2.0]"], "depths: got"),
        (["--mesh.tp", "3"], "mesh.tp: got 3, must divide heads = 2"),
    ):
        assert needle.main([*SMALL, *args]) == 2
        assert reason in capsys.readouterr().err, reason
    for args, reason in ((["--dtype", "float16"], "dtype: got"), (["--redraw", "a.json"], "needs --plot")):
        with pytest.raises(SystemExit) as refusal:
            needle.main([*SMALL, *args])
        assert refusal.value.code == 2 and reason in capsys.readouterr().err


def test_default_is_one_request_in_a_pool_just_big_enough():
    config = needle.NeedleConfig(tokens=10_000_000)
    assert config.served.chunk_buckets == (config.serve.chunk_tokens,)
    assert 0 <= 128 * config.served.pool_pages - config.total_tokens < 128
    split = needle.NeedleConfig(tokens=10_000_000, mesh=mn.MeshSpec(kvp=2))
    assert 0 <= 2 * 128 * split.served.pool_pages - config.total_tokens < 2 * 128
