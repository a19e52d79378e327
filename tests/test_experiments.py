"""The scripts, their configs and the notebook do what they say, and the script says so when an answer is wrong."""

import dataclasses
import importlib
import json
from pathlib import Path

import draccus
import jax
import numpy as np
import pytest
from make_checkpoint import make

import mnemosyne_jax as mn
from experiments import command_line, generate, results, scaling, schedule_picture
from mnemosyne_jax.serve.batch import Batch, ChunkRow, DecodeRow

ROOT = Path(__file__).parent.parent
SCRIPT = {"quickstart": "generate"}  # other YAML files are named after their script
TINY = [
    *("--mesh.kvp", "2", "--compare_unsharded", "--haystack_tokens", "512"),
    *("--short_requests", "1", "--short_tokens", "60", "--short_new_tokens", "5"),
    *(
        "--serve.chunk_tokens",
        "128",
        "--serve.chunk_buckets",
        "[128]",
        "--serve.page_tokens",
        "32",
        "--serve.span_tokens",
        "256",
    ),
]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_loads_into_its_config(path):
    kinds = {"model": mn.ModelConfig, "hardware": mn.HardwareConfig, "layouts": scaling.Layout}
    if path.parent.name in kinds:
        draccus.parse(kinds[path.parent.name], config_path=path, args=[])
        return
    module = importlib.import_module(f"experiments.{SCRIPT.get(path.stem, path.stem)}")
    classes = [
        c
        for name, c in vars(module).items()
        if name.endswith("Config") and getattr(c, "__module__", "") == module.__name__
    ]
    assert len(classes) == 1
    command_line.read(classes[0], ["--config_path", str(path)])


def test_quickstart_is_what_was_promised():
    config = command_line.read(generate.GenerateConfig, ["--config_path", str(ROOT / "configs" / "quickstart.yaml")])
    assert config.mesh == mn.MeshSpec(2, 2, 2) and config.virtual_devices == 8 and config.compare_unsharded
    assert config.haystack_tokens >= 16384 > config.serve.span_tokens and config.short_requests == 2


# The picture.


def chunk(request, group, start, length):
    return ChunkRow(request, 0, group, (), start, length)


def decode(request, group):
    return DecodeRow(request, 0, group, (), 0)


LONG, SHORT = mn.Request("long", [0] * 90), mn.Request("short", [0] * 7)


def test_picture_of_a_long_and_a_short_request():
    batches = [Batch(5, (), (chunk(SHORT, 1, 0, 7), chunk(LONG, None, 0, 3)))]
    batches += [Batch(6 + t, (decode(SHORT, 1),) if t % 2 else (), (chunk(LONG, None, 3 + t, 1),)) for t in range(8)]
    batches += [Batch(14, (decode(LONG, None),)), Batch(15), Batch(16)]
    assert schedule_picture.lines(batches, mn.MeshSpec(kvp=2, spp=2)) == [
        "A short: 7 tokens, group 1",
        "B long: 90 tokens, every group",
        "capital: chunk of the prompt, small: decode, columns: stages",
        "      | group 0 | group 1",
        " tick | 0   1   | 0   1",
        "    5 | B   .   | AB  .",
        "    6 | B   B   | B   AB",
        "    7 | B   B   | Ba  B",
        "    8 | B   B   | B   Ba",
        "  ... | 5 ticks like the 2 above",
        "   14 | b   B   | b   Ba",
        "   15 | .   b   | .   b",
    ]


def test_picture_of_one_stage_and_of_nothing():
    batches = [Batch(t, (), (chunk(LONG, 0, 10 * t, 10),)) for t in range(9)] + [Batch(9, (decode(LONG, 0),))]
    drawn = schedule_picture.lines(batches, mn.MeshSpec())
    assert drawn[-3:] == ["    0 | A", "  ... | 8 ticks like the one above", "    9 | a"]
    assert schedule_picture.lines([Batch(0), Batch(1)], mn.MeshSpec(spp=2)) == ["nothing was scheduled"]


def test_lines_leave_no_tick_out():
    """Shown and counted ticks are all ticks, and what is counted does repeat what is shown."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = rng.integers(0, 2, rng.integers(1, 40)).repeat(rng.integers(1, 6)).tolist()
        rebuilt = []
        for start, shown, more in schedule_picture._runs(rows, longest_period=3):
            assert start == len(rebuilt)
            part = rows[start : start + shown]
            rebuilt += part + [part[i % shown] for i in range(more)]
        assert rebuilt == rows


def test_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    batches = [Batch(0, (), (chunk(LONG, None, 0, 90), chunk(SHORT, 1, 0, 7))), Batch(1, (decode(LONG, None),))]
    assert schedule_picture.save_png(batches, mn.MeshSpec(kvp=2), tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")


# Records.


def test_musts_are_met_or_missed(capsys, tmp_path):
    rows = [
        results.row("speed", 3.0, "s", must="<= 4", aim="<= 2", chunk=512),
        results.row("share", None, "1", must=">= 0.5"),
    ]
    assert list(rows[0]) == ["name", "chunk", "value", "unit", "must", "aim"]
    made = results.document(generate.GenerateConfig(), rows, ceilings={"matmul_tflops": 1.0})
    assert json.loads(results.write(tmp_path / "new" / "x.json", made).read_text()) == json.loads(json.dumps(made))
    assert list(made) == ["device", "versions", "command", "revision", "config", "ceilings", "rows"]
    assert (
        made["device"]["platform"] == jax.devices()[0].platform
        and made["versions"]["jax"]
        and made["config"]["mesh"]["kvp"] == 1
    )
    assert not results.check(made)
    assert capsys.readouterr().out.splitlines() == [
        "must <= 4 met: speed (chunk 512) = 3.0 s",
        "aim <= 2 not yet: speed (chunk 512) = 3.0 s",
        "must >= 0.5 MISSED: share () = None 1",
    ]
    assert results.check({"rows": rows[:1]})
    assert not results.keeps(float("nan"), "<= 4") and results.keeps(1, "== 1")
    with pytest.raises(ValueError, match="a bound reads like"):
        results.row("speed", 3.0, "s", must="less than 4")


def test_logarithmic_axes_have_plain_numbers():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = Figure()
    for low, high, labels in ((0.015, 0.035, ["0.02", "0.03"]), (0.05, 20, ["0.1", "1", "10"])):
        axes = drawn.add_subplot()
        axes.set(yscale="log", ylim=(low, high))
        results.plain_log(axes.yaxis)
        drawn.draw_without_rendering()
        ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
        assert [
            tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()
        ] == labels


def test_command_line_says_what_it_refuses(capsys):
    assert command_line.read(generate.GenerateConfig, ["--check", "--mesh.tp", "2"]).check
    assert not command_line.read(generate.GenerateConfig, ["--check", "false"]).check
    for args, reason in (
        (["--mesh.spp", "0"], "mesh.spp: got 0, must be at least 1"),
        (["--no_such", "1"], "--no_such"),
    ):
        with pytest.raises(SystemExit) as refusal:
            command_line.read(generate.GenerateConfig, args)
        assert refusal.value.code == 2 and reason in capsys.readouterr().err


# The main script.


@pytest.fixture(scope="module")
def served():
    """Runs by mesh and requests, so that tests of the verdict need not serve the same again."""
    return {}


@pytest.fixture
def remember(monkeypatch, served):
    def once(model, mesh, settings, requests, console):
        key = (model.path, str(mesh), tuple(len(r.prompt) for r in requests))
        if key not in served:
            served[key] = real(model, mesh, settings, requests, console)
        return served[key]

    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    real = generate.serve
    monkeypatch.setattr(generate, "serve", once)


def test_generate_retrieves_as_the_unsharded_run_does(remember, served, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert generate.main([*TINY, "--out", str(out), "--check"]) == 0
    rows = json.loads(out.read_text())["rows"]
    verdicts = [(r["request"], r["name"], r["value"]) for r in rows if "must" in r]
    names = {"failed": 0, "right": 1, "= unsharded": 1}
    assert verdicts == [(id, name, value) for id in ("short 1", "haystack") for name, value in names.items()]
    text = capsys.readouterr().out
    for words in ("building", "7/7 programs", "512/512 tokens", "TTFT", "TBT p99", "AB", "right", "must == 1 met"):
        assert words in text, words
    mesh, unsharded = served.values()
    assert len(mesh.batches) > len(unsharded.batches)  # smaller chunks
    assert {row.group for batch in mesh.batches for row in batch.chunks} == {None, 0}


def test_generate_fails_on_a_wrong_value(remember, monkeypatch, tmp_path, capsys):
    def sabotaged(config, tokenizer):
        requests, expected = make_requests(config, tokenizer)
        return requests, expected | {"haystack": [*expected["haystack"][:-2], 5, 1]}

    make_requests = generate.make_requests
    monkeypatch.setattr(generate, "make_requests", sabotaged)
    assert generate.main([*TINY, "--out", str(tmp_path / "out.json")]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_generate_fails_on_a_token_unlike_the_unsharded_run(remember, monkeypatch, tmp_path):
    def sabotaged(model, mesh, *rest):
        run = once(model, mesh, *rest)
        if mesh != mn.MeshSpec():
            return run
        answer = run.answers["short 1"]
        other = dataclasses.replace(answer, tokens=[*answer.tokens[:-1], 7])
        return dataclasses.replace(run, answers=run.answers | {"short 1": other})

    once = generate.serve
    monkeypatch.setattr(generate, "serve", sabotaged)
    assert generate.main([*TINY, "--out", str(tmp_path / "out.json")]) == 1


def test_generate_refuses(tmp_path, capsys):
    make("qwen2", tmp_path)
    (tmp_path / "ids.txt").write_text("1 2 x")
    model = ["--model.path", str(tmp_path)]
    for args, reason in (
        (["--mesh.tp", "3"], "mesh.tp: got 3, must divide"),
        (["--prompt", "hello"], "needs a tokenizer"),
        ([*model, "--prompt", "hello"], "needs a tokenizer"),
        (model, "needs --prompt TEXT or --prompt_ids FILE"),
        ([*model, "--prompt_ids", str(tmp_path / "ids.txt")], "readable file of token ids"),
        ([*model, "--prompt_ids", str(tmp_path / "none.npy")], "readable file of token ids"),
    ):
        assert generate.main(args) == 2
        assert reason in " ".join(capsys.readouterr().out.split()), reason


@pytest.mark.parametrize(
    "name, text", [("a.txt", "3 1\n4\n1 5\n"), ("a.csv", "3,1,4,\n1, 5"), ("a.json", " [3, 1, 4, 1, 5]\n")]
)
def test_ids_are_read_from_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    np.save(tmp_path / "a.npy", np.array([3, 1, 4, 1, 5]))
    for path in (tmp_path / name, tmp_path / "a.npy"):
        assert generate.read_ids(str(path)).tolist() == [3, 1, 4, 1, 5]


def test_a_checkpoint_continues_ids_and_text(remember, served, tmp_path, capsys):
    """With ids from a file; then, once the folder has a tokenizer, with text that stands for the same ids."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    folder, out = make("llama3", tmp_path / "model"), tmp_path / "out.json"
    ids = np.random.default_rng(0).integers(6, 211, 40).tolist()
    (tmp_path / "ids.txt").write_text(" ".join(map(str, ids)))
    common = ["--model.path", str(folder), "--out", str(out), "--max_new_tokens", "6"]
    common += ["--serve.chunk_tokens", "32", "--serve.chunk_buckets", "[32]"]
    assert generate.main([*common, "--prompt_ids", str(tmp_path / "ids.txt")]) == 0
    row = next(r for r in json.loads(out.read_text())["rows"] if r["name"] == "tokens")
    assert row["context"] == 40 and 1 <= len(row["value"]) <= 6 and all(0 <= token < 211 for token in row["value"])
    assert str(row["value"]) in capsys.readouterr().out

    vocab = {f"w{id}": id for id in range(211)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0").save_pretrained(folder)
    prompt = " ".join(f"w{id}" for id in ids)
    requests, _ = generate.make_requests(generate.GenerateConfig(prompt=prompt), generate.read_tokenizer(str(folder)))
    assert requests[0].prompt == ids
    assert generate.main([*common, "--prompt", prompt]) == 0
    assert " ".join(f"w{token}" for token in row["value"]) in " ".join(capsys.readouterr().out.split())


# The notebook.


def test_notebook_is_its_reviewed_twin():
    jupytext, nbformat = pytest.importorskip("jupytext"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "experiments" / "explore.ipynb", as_version=4)
    script = jupytext.read(ROOT / "experiments" / "explore.py")
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in script.cells]
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_notebook_runs(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "experiments" / "explore.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "experiments")}}
    ).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert printed.count(": right") == 4 and "device 7" in printed and "capital: chunk" in printed
