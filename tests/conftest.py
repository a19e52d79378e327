"""Every test runs on eight virtual CPU devices; MNEMOSYNE_TEST_PLATFORM=cuda asks for the GPUs instead."""

import os

if platform := os.environ.get("MNEMOSYNE_TEST_PLATFORM"):
    os.environ["JAX_PLATFORMS"] = platform if platform == "cpu" else f"{platform},cpu"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Virtual devices share few cores: a late participant of a collective is slow, not stuck.
# XLA aborts on a flag that it does not know; all of these are known from jaxlib 0.11.2 on.
FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 600,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 600,
    "--xla_cpu_collective_timeout_seconds": 600,
}
if os.environ["JAX_PLATFORMS"] == "cpu":
    FLAGS["--xla_backend_optimization_level"] = 0  # tests compile much and run little
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(f"{k}={v}" for k, v in FLAGS.items() if k not in given)]).strip()

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    """Keeps compiled programs between runs (`pytest --cache-clear` drops them), but not in processes tests start."""
    if getattr(config, "cache", None) and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_collection_modifyitems(items):
    needy = [item for item in items if "gpu" in item.keywords]
    if needy and jax.default_backend() != "gpu":
        for item in needy:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each family."""
    from make_checkpoint import FAMILIES, make

    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make(family, root / family, shards=1 + i % 3) for i, family in enumerate(FAMILIES)}
