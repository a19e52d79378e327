"""A soak of a small trace is clean, and what would not be is told."""

import json

import pytest

from experiments import soak
from mnemosyne_jax.serve.pages import PagePool
from mnemosyne_jax.serve.scheduler import Scheduler

TRACE = "num_prefill_tokens,num_decode_tokens\n" + "".join(
    f"{50 + 7001 * i % 40_000},{1 + 7 * i % 40}\n" for i in range(60)
)


@pytest.fixture
def run(tmp_path):
    """The values of a soak's rows by name and policy, and its exit code."""
    (tmp_path / "lengths.csv").write_text(TRACE)
    args = ["--traces", f"[{tmp_path / 'lengths.csv'}]", "--cancel_share", "0.3", "--drain_s", "60"]

    def once(*more):
        code = soak.main([*args, "--out", str(tmp_path / "out.json"), *more])
        rows = json.loads((tmp_path / "out.json").read_text())["rows"]
        return {(r["name"], r["policy"]): r["value"] for r in rows}, code

    return once


def test_a_clean_soak(run):
    values, code = run()
    assert code == 0
    for policy in ("lars", "fcfs"):
        assert values["length", policy] + values["cancelled", policy] == 60 and values["cancelled", policy] >= 10
        assert all(values[name, policy] == 0 for name in ("exceptions", "starved requests", "leaked pages"))
    values, _ = run("--first_requests", "10", "--policies", "[srpt]")
    assert values["length", "srpt"] + values["cancelled", "srpt"] == 10


def test_a_leak_is_told(run, monkeypatch):
    release = PagePool.release
    monkeypatch.setattr(PagePool, "release", lambda pool, pages, tick: release(pool, pages[:-1], tick))
    values, code = run("--policies", "[lars]")
    assert code == 1 and values["leaked pages", "lars"] > 10 and values["leaked slots", "lars"] == 0


def test_a_page_that_is_owned_twice_is_told(run, monkeypatch):
    release = PagePool.release
    monkeypatch.setattr(
        PagePool, "release", lambda pool, pages, tick: release(pool, pages[[0, *range(len(pages) - 1)]], tick)
    )
    values, code = run("--policies", "[lars]")
    assert code == 1 and values["leaked pages", "lars"] > 0


def test_starvation_and_exceptions_are_told(run, monkeypatch, capsys):
    assert run("--policies", "[lars]", "--drain_s", "-1.0")[0]["starved requests", "lars"] > 0

    def broken(scheduler, now_s):
        raise RuntimeError("planted")

    monkeypatch.setattr(Scheduler, "next_batch", broken)
    values, code = run("--policies", "[lars]")
    assert code == 1 and values["exceptions", "lars"] == 1 and "planted" in capsys.readouterr().err
