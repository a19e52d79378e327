"""The kernel benchmark at tiny sizes on the CPU: what it counts, what its record holds, what it does about failures."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_kernels, clocks, command_line, kernel_inputs, kernel_record, results, rivals
from experiments.kernel_inputs import BenchKernelsConfig
from experiments.rivals import Shape
from pallas_kernels import reference

TINY = [
    *("--impl", "reference", "--chunks", "[1, 16]", "--contexts", "[8, 64, 32]", "--head_dims", "[16]"),
    *("--query_heads", "4", "--kv_heads", "2", "--page_tokens", "8", "--batch_rows", "[2, 2]", "--batch_unit", "4"),
    *("--merge_tokens", "[4]", "--merge_partials", "[2]", "--matmul_size", "64", "--copy_bytes", "65536"),
    *("--max_calls", "2", "--sample_ms", "0.1", "--sustained_chunks", "[16]", "--sustained_s", "0.01"),
]
GRID = [(1, 64), (16, 64), (1, 32), (16, 32), (1, 8)]  # a chunk of 16 has no place in a context of 8


def of_name(record, name, by="ours"):
    return {
        (r["chunk"], r["context"]): r for r in record["rows"] if r["name"] == name and r["by"] == by and "chunk" in r
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ours and two rivals, one of which fails at one shape: (exit code, record, folder)."""

    def steady(shape, calls):
        if (shape.chunk, shape.context) == (16, 64):
            raise RuntimeError("no kernel\nfor this shape")
        return lambda launches: 1e-3 * launches * calls

    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clocks, "REST_S", 0)
        patch.setattr(bench_kernels, "REST_S", 0)
        patch.setattr(rivals, "RIVALS", {"steady": steady, "elsewhere": steady})
        patch.setattr(rivals, "why_absent", lambda name: "is not here" if name == "elsewhere" else None)
        args = [*TINY, "--out", str(folder / "a.json"), "--plot", str(folder / "a.png"), "--check"]
        code = bench_kernels.main(args)
    return code, json.loads((folder / "a.json").read_text()), folder


def test_record_holds_the_ceilings_and_every_row(run):
    code, record, _ = run
    names = ("matmul_tflops", "copy_tb_per_s")
    assert code == 0 and set(record["ceilings"]) == {*names, *(f"{name}_at_the_end" for name in names)}
    assert all(value > 0 for value in record["ceilings"].values())
    assert "visible (query, key) pair" in record["convention"] and record["versions"]["jax"]
    for name, unit in (("attention time", "ms"), ("attention rate", "TFLOP/s"), ("attention read", "TB/s")):
        rows = of_name(record, name)
        assert list(rows) == GRID
        assert all(r["value"] > 0 and r["unit"] == unit and r["spread_ms"] >= 0 for r in rows.values())
    errors = [r for r in record["rows"] if r["name"] == "relative error"]
    assert len(errors) == len(GRID) + 3 and all(r["value"] < 1e-5 and r["must"] == "<= 0.01" for r in errors)
    batches = [r for r in record["rows"] if r["name"] == "attention read" and "keys" in r]
    assert [r["shape"] for r in batches] == [
        "2 rows of 1 to 64 x 4",
        "2 rows of 1 to 8 x 4",
        "1 rows of 1 to 8 x 4 and one of 64",
    ]
    merged = {r["name"]: r["value"] for r in record["rows"] if r.get("shape") == "2 partials of 4 tokens"}
    assert merged["merge"] > 0 and merged["merge / copy"] > 0


def test_what_a_rival_reached_and_what_it_did_not(run):
    _, record, _ = run
    rates = of_name(record, "attention rate", "steady")
    assert set(rates) == set(GRID) - {(16, 64)}
    assert rates[16, 32]["value"] == pytest.approx(4 * 4 * 16 * 16 * 32 / 1e-3 / 1e12, rel=1e-3)  # all pairs
    reason = {
        "by": "steady",
        "chunk": 16,
        "context": 64,
        "head_dim": 16,
        "reason": "RuntimeError: no kernel for this shape",
    }
    assert record["absent"] == [{"by": "elsewhere", "reason": "is not here"}, reason]


def test_no_rival_is_begun_when_time_is_up(monkeypatch):
    config, found = command_line.read(BenchKernelsConfig, TINY), kernel_record.Found(None)
    shape = config.shape(16, 64, 16)
    assert not bench_kernels.prepare_rivals(config, found, shape, ["torch flash"], end_s=0.0)
    assert not found.rows and found.absent == [{"by": "torch flash", **shape.where, "reason": "no time left"}]


def test_a_kernel_that_fails_or_errs_misses_its_musts(monkeypatch, capsys):
    config = command_line.read(BenchKernelsConfig, [*TINY, "--chunks", "[16]", "--contexts", "[32]"])

    def errs(*args, **rows):
        out, lse = reference.chunked_prefill(*args, **rows)
        return 1.02 * out, lse

    monkeypatch.setattr(bench_kernels, "kernels_of", lambda config: SimpleNamespace(chunked_prefill=errs))
    monkeypatch.setattr(rivals, "RIVALS", {})
    found = kernel_record.Found("NVIDIA H100")
    bench_kernels.bench_grid(config, found, lambda: None)
    error, *failed = [r for r in found.rows if r["name"] == "relative error"]
    assert error["value"] == pytest.approx(0.02, rel=1e-2) and len(failed) == 3  # there is no paged_decode
    assert [left["by"] for left in found.absent] == ["ours"] * 3 and not any("value" in r for r in failed)
    assert not results.check({"rows": found.rows}) and "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_error_sees_any_output_that_is_not_finite(poison):
    config = command_line.read(BenchKernelsConfig, TINY)
    kv, rows, (table,) = (
        kernel_inputs.make_kv(config, 16),
        kernel_inputs.prefill_rows(16, 32),
        kernel_inputs.page_tables(config, [64], 1),
    )
    q = rivals.normal(0, (16, 4, 16))
    out, _ = reference.chunked_prefill(q, kv, 0, table, **rows)
    assert bench_kernels.relative_error(out, q, kv, table, rows) < 1e-5
    assert np.isnan(bench_kernels.relative_error(out.at[7, 1, 2].set(poison), q, kv, table, rows))


def test_one_program_serves_all_contexts_of_a_chunk():
    config = command_line.read(BenchKernelsConfig, TINY)
    _, calls = bench_kernels.programs(config, 16, decode=False)
    kv, tables = kernel_inputs.make_kv(config, 16), kernel_inputs.page_tables(config, [64], 2)
    qs = [rivals.normal(i, (16, 4, 16)) for i in range(2)]
    results = [(jnp.zeros(q.shape), jnp.zeros(q.shape[:2])) for q in qs]
    outs = []
    for context in (32, 64):
        results = calls(results, qs, kv, tables, kernel_inputs.prefill_rows(16, context), None)
        outs.append(jax.tree.map(np.array, results))
    assert calls._cache_size() == 1
    assert not np.array_equal(outs[0][0][0], outs[0][1][0])  # neither call was dropped for the other


def test_calls_of_a_launch_read_different_pages():
    config = command_line.read(BenchKernelsConfig, [*TINY, "--max_calls", "4", "--batch_rows", "[8, 2]"])
    pool = kernel_inputs.pool_pages(config)
    tables = np.array(kernel_inputs.page_tables(config, [64], 4))
    assert tables.shape == (4, 1, 8) and len(set(tables.ravel().tolist())) == 32 <= pool
    contexts = [9, 1, 64]
    (table,) = kernel_inputs.page_tables(config, contexts, 1)
    used = [page for row, context in zip(table.tolist(), contexts, strict=True) for page in row[: -(-context // 8)]]
    assert table.shape == (3, 8) and len(set(used)) == len(used) == 2 + 1 + 8 and max(used) < pool


@pytest.mark.parametrize("chunk, context", [(1, 1), (1, 9), (3, 3), (4, 11)])
def test_operations_and_bytes_against_brute_force(chunk, context):
    shape = Shape(chunk, context, head_dim=16, query_heads=6, kv_heads=2)
    rows = kernel_inputs.prefill_rows(chunk, context)
    sees = np.arange(context) <= np.asarray(rows["q_positions_T"])[:, None]
    q, kv = np.zeros((chunk, 6, 16)), np.zeros((2, context, 2, 16), jnp.bfloat16)
    operations = sum(
        2 * len(q[i, n]) + 2 * len(kv[1, j, 0]) for n in range(6) for i, j in zip(*np.nonzero(sees), strict=True)
    )
    assert shape.visible == sees.sum() and shape.flops == operations and shape.kv_bytes == kv.nbytes
    assert shape.full_flops == operations * sees.size / sees.sum()


def test_contenders_take_turns(monkeypatch):
    monkeypatch.setattr(clocks, "REST_S", 0)
    asked = []

    def clock_of(name, launch_s):
        def clock(launches):
            asked.append((name, launches))
            return launch_s * launches * (1 + 0.01 * (len(asked) % 5))

        return clock

    timings = clocks.time_in_turns({"a": (clock_of("a", 1e-3), 4), "b": (clock_of("b", 1.0), 1)}, 10e-3)
    assert asked[:4] == [("a", 1), ("a", 1), ("b", 1), ("b", 1)]
    assert asked[4:] == [("a", 10), ("b", 1)] * clocks.ROUNDS
    assert timings["a"].median_s == pytest.approx(1e-3 / 4, rel=0.05) and 0 < timings["a"].spread_s < 0.05e-3 / 4
    assert timings["b"].median_s == pytest.approx(1.0, rel=0.05)
    asked.clear()
    clocks.time_calls(clock_of("short", 1e-6), 1, 10e-3)
    assert asked[-1] == ("short", clocks.MOST_LAUNCHES)


def test_sustained_rates_of_ours_the_fastest_rival_and_the_matrix_product(run):
    _, record, _ = run
    rates = {row["by"]: row for row in record["rows"] if row["name"] == "sustained rate"}
    assert set(rates) == {"ours", "matmul"} and all(row["value"] > 0 for row in rates.values())  # "steady" fails there
    found = kernel_record.Found(None)
    shape = Shape(16, 64, 16, 4, 2)
    for by, median_s in (("slow", 2.0), ("fast", 1.0), ("ours", 0.5)):
        found.measured(by, clocks.Timing(median_s, 0.0), shape, shape.flops, **shape.where)
    assert found.fastest_rival(shape) == "fast" and found.fastest_rival(Shape(1, 64, 16, 4, 2)) is None


def test_musts_are_those_of_the_targets():
    def limits(name, chunk, context, head_dim=128, rows=1, kind="NVIDIA H100 80GB HBM3"):
        return tuple(kernel_record.bounds(name, Shape(chunk, context, head_dim, 32, 8), rows, kind).values())

    assert limits("attention rate", 2048, 131_072) == (">= 620", ">= 670")
    assert limits("attention rate", 128, 1_048_576) == (">= 600", ">= 650")
    assert limits("attention rate", 512, 131_072, 64) == (">= 500", ">= 570")
    assert limits("attention time", 32, 1_048_576) == ("<= 1.65", "<= 1.5")
    assert limits("attention time", 1, 4_096) == ("<= 0.015", "<= 0.008")
    assert limits("attention read", 1, 65_536) == (">= 2.75", ">= 2.95")
    assert limits("attention read", 1, 65_536, kind="NVIDIA H200") == (">= 3.7", ">= 4.1")
    assert limits("attention read", 1, 500_000, rows=32) == (">= 2.4", ">= 2.8")
    for none in (("attention rate", 512, 65_536), ("attention rate", 32, 1_048_576), ("attention time", 1, 65_536)):
        assert not limits(*none)
    assert not limits("attention read", 1, 500_000, rows=256) and not limits("attention read", 1, 1_048_576, 64)


def test_memory_ceiling_is_the_time_to_read_the_keys():
    config, shape = {"query_heads": 32, "kv_heads": 8}, Shape(32, 1_048_576, 128, 32, 8)
    read_s = shape.kv_bytes / 3e12
    tflops = kernel_record.memory_ceiling_tflops(config, shape.chunk, shape.context, copy_tb_per_s=3.0)
    assert tflops == pytest.approx(shape.flops / read_s / 1e12)


def test_picture_is_drawn_and_drawn_again(run, capsys):
    pytest.importorskip("matplotlib")
    _, record, folder = run
    first = (folder / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert bench_kernels.main(["--redraw", str(folder / "a.json"), "--plot", str(folder / "b.png")]) == 0
    assert (folder / "b.png").read_bytes() == first
    (axes,) = kernel_record.figure(record).axes
    labels = [line.get_label() for line in axes.get_lines()]
    assert [label for label in labels if label[0] != "_"][:2] == ["ours", "steady"]
    assert any("matmul" in label for label in labels)
    assert list(axes.get_lines()[0].get_xdata()) == [1, 16]


def test_refuses(capsys):
    for args, reason in (
        (["--impl", "other"], "must be mosaic or reference"),
        (["--redraw", "a.json"], "needs --plot"),
    ):
        with pytest.raises(SystemExit):
            bench_kernels.main(args)
        assert reason in capsys.readouterr().err
