"""Who may import whom, and who may talk across devices, compile or read a clock: read off the source."""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGES = ("mnemosyne_jax", "pallas_kernels")
SOURCES = sorted(p.relative_to(ROOT).as_posix() for folder in PACKAGES for p in (ROOT / folder).rglob("*.py"))
OURS = {"mnemosyne_jax", "pallas_kernels", "experiments", "tests"}
HERE = "mnemosyne_jax"
CORE = [f"{HERE}.config", f"{HERE}.errors"]
MODEL = ["jax", "flax", "numpy", "einops", "chex", f"{HERE}.mesh", *CORE, f"{HERE}.model"]

# The first pattern that fits a file says what it may import beside the standard library: a name, and all below it.
# A file without a rule (the surface: api, runtime, checkpoint, ...) may import everything but ANYWHERE's exceptions.
MAY_IMPORT = {
    "pallas_kernels/tensor_core.py": ["jax", "jaxlib.mlir", "numpy", "pallas_kernels"],
    "pallas_kernels/*": ["jax", "numpy", "pallas_kernels"],
    f"{HERE}/errors.py": [],
    f"{HERE}/config.py": ["draccus", "yaml", f"{HERE}.errors"],
    f"{HERE}/mesh.py": ["jax", "flax", "numpy", *CORE],
    f"{HERE}/model/attention.py": [*MODEL, "pallas_kernels"],
    f"{HERE}/model/partial.py": [*MODEL, "pallas_kernels"],
    f"{HERE}/model/ring.py": [*MODEL, "pallas_kernels"],
    f"{HERE}/model/*": MODEL,
    f"{HERE}/serve/*": ["numpy", *CORE, f"{HERE}.serve"],
    f"{HERE}/packing.py": [
        "numpy", *CORE, f"{HERE}.serve.batch", f"{HERE}.serve.pages", f"{HERE}.model.inputs",
    ],
}  # fmt: skip
NOWHERE = {"torch", "experiments", "tests"}

# Where a name may be used; matched against the last word of every name and attribute in the source.
MAY_USE = {
    frozenset({"psum", "pmax", "pmin", "pmean", "psum_scatter", "all_gather", "all_to_all", "ppermute"}): {
        f"{HERE}/model/layers.py", f"{HERE}/model/partial.py", f"{HERE}/model/ring.py", f"{HERE}/model/step.py",
    },
    frozenset({"jit", "pmap", "shard_map"}): {
        f"{HERE}/model/step.py",
        f"{HERE}/model/params.py",  # init: made where it will live
        f"{HERE}/snapshot.py",  # one layer to and from the layout on disk
    },
    frozenset({"time", "sleep"}): {f"{HERE}/runtime.py", f"{HERE}/mesh.py"},
}  # fmt: skip


def imports(source: str) -> set[str]:
    """Full dotted names that a source imports anywhere, inside functions too: `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def words(source: str) -> set[str]:
    """Every bare name, attribute and imported word of a source."""
    found = {part for name in imports(source) for part in name.split(".")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


def refused_imports(file: str, source: str) -> set[str]:
    """Imports of `file` that its rule does not allow."""
    names = {name for name in imports(source) if name.split(".")[0] not in sys.stdlib_module_names}
    refused = {name for name in names if name.split(".")[0] in NOWHERE}
    for pattern, allowed in MAY_IMPORT.items():
        if fnmatch(file, pattern):
            return refused | {name for name in names if not any(f"{name}.".startswith(f"{a}.") for a in allowed)}
    return refused


def refused_words(file: str, source: str) -> set[str]:
    """Names used in `file` that belong to other files."""
    return {w for group, files in MAY_USE.items() if file not in files for w in group & words(source)}


@pytest.mark.parametrize("file", SOURCES)
def test_layering(file):
    source = (ROOT / file).read_text()
    assert not refused_imports(file, source)
    assert not refused_words(file, source)


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").rglob("*.py")) + sorted((ROOT / "tests").glob("*.py")))
def test_torch_stays_out(file):
    """Scripts that make expected values (`tests/make_*.py`) run by hand, in an environment of their own."""
    if not file.name.startswith("make_"):
        assert "torch" not in {name.split(".")[0] for name in imports(file.read_text())}


@pytest.mark.parametrize(
    "file, source",
    [
        ("pallas_kernels/paged_decode.py", "from mnemosyne_jax.config import MeshSpec"),
        (f"{HERE}/errors.py", "import numpy"),
        (f"{HERE}/serve/scheduler.py", "def f():\n    import jax"),
        (f"{HERE}/serve/policy.py", "from mnemosyne_jax import mesh"),
        (f"{HERE}/model/step.py", "from pallas_kernels.reference import paged_decode"),
        (f"{HERE}/model/layers.py", "import mnemosyne_jax.serve.batch"),
        (f"{HERE}/packing.py", "import mnemosyne_jax.serve.scheduler"),
        (f"{HERE}/packing.py", "import mnemosyne_jax.model.inputs_of_another"),
        (f"{HERE}/checkpoint.py", "import torch.nn"),
        (f"{HERE}/api.py", "from experiments import generate"),
    ],
)
def test_imports_are_refused(file, source):
    assert refused_imports(file, source)


@pytest.mark.parametrize(
    "file, source",
    [
        (f"{HERE}/model/attention.py", "jax.lax.psum(x, 'kvp')"),
        (f"{HERE}/model/cache.py", "from jax.lax import all_gather"),
        (f"{HERE}/model/layers.py", "@jax.jit\ndef f(): ..."),
        (f"{HERE}/api.py", "from jax import shard_map"),
        (f"{HERE}/serve/engine.py", "import time"),
        (f"{HERE}/serve/scheduler.py", "from time import monotonic"),
    ],
)
def test_words_are_refused(file, source):
    assert refused_words(file, source)


def test_serve_needs_no_jax():
    """The control plane loads without jax, also through what it imports (the package's own __init__ set aside)."""
    code = f"""
import importlib, pathlib, sys, types
package = sys.modules["{HERE}"] = types.ModuleType("{HERE}")
package.__path__ = ["{HERE}"]
for file in pathlib.Path("{HERE}/serve").glob("[!_]*.py"):
    importlib.import_module("{HERE}.serve." + file.stem)
sys.exit("jax" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_package_imports_without_what_only_some_uses_need():
    """Benchmarks run where safetensors, orbax, transformers and torch are not installed."""
    code = """import sys
for name in ("safetensors", "orbax", "orbax.checkpoint", "transformers", "torch", "matplotlib"):
    sys.modules[name] = None
import mnemosyne_jax, experiments.results, experiments.command_line, experiments.bench_packing"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda f: f.name)
def test_yaml_parses(file):
    assert isinstance(yaml.safe_load(file.read_text()), dict)


def test_no_path_of_one_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(rb"(?<![\w.])/(?:work|root)(?=/)")
    tracked = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert not [str(f) for f in tracked if f.is_file() and private.search(f.read_bytes())]
