"""What README shows runs."""

import re
from pathlib import Path

import mnemosyne_jax as mn

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert "prompt -1 token ids must be in" in capsys.readouterr().out


def test_names_in_text_exist():
    for name in re.findall(r"`mn\.([A-Za-z_]+)", README):
        assert hasattr(mn, name), name
    for path in re.findall(r"(?:configs|experiments)/[\w./-]+", README):
        assert (Path(__file__).parent.parent / path.rstrip(".")).exists(), path


def test_plain_lines_are_what_make_runs():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for line in ("-m experiments.generate --config_path configs/quickstart.yaml", "-m pytest", "[test,viz,notebooks"):
        assert line in README and line in makefile
