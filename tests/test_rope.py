"""Laws of the rotary tables: exact at any position, and Hugging Face's own numbers where those are asked for.

`expected/rope.json` is written by `make_rope_expected.py` from transformers and torch.
"""

import decimal
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnemosyne_jax.config import RopeConfig
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.model import rope as rope_module
from mnemosyne_jax.model.rope import rotary_frequencies, rotary_tables, rotate

EXPECTED = json.loads((Path(__file__).parent / "expected" / "rope.json").read_text())
CASES = [
    pytest.param(case, id=f"{case['rope']['type']}-{case['rope']['theta']:g}-{case['head_dim']}-{number}")
    for number, case in enumerate(EXPECTED["cases"])
]
POSITIONS_T = np.array([0, 1, 10**6, 10**7, 2**24 + 1, 2**31 - 1], np.int32)


def compute_tables(positions_T, rope, head_dim, precision):
    cos, sin = jax.jit(lambda positions: rotary_tables(positions, rope, head_dim, precision))(positions_T)
    assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == sin.shape == (len(positions_T), head_dim // 2)
    return np.asarray(cos), np.asarray(sin)


def largest_error(positions_T, rope, head_dim, precision):
    """Per position, against float64 angles."""
    cos, sin = compute_tables(positions_T, rope, head_dim, precision)
    frequency, factor = rotary_frequencies(rope, head_dim)
    angle = positions_T.astype(np.float64)[:, None] * frequency
    return np.maximum(np.abs(cos - factor * np.cos(angle)), np.abs(sin - factor * np.sin(angle))).max(axis=1)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e7, 2.0**64])
def test_exact_is_within_1e6_of_float64(theta, head_dim):
    assert (largest_error(POSITIONS_T, RopeConfig(theta=theta), head_dim, "exact") < 1e-6).all()


@pytest.mark.parametrize("case", CASES)
def test_exact_is_within_1e6_of_float64_for_every_type(case):
    rng = np.random.default_rng(0)
    positions_T = np.concatenate([POSITIONS_T, rng.integers(0, 2**31, 500, dtype=np.int32)])
    assert (largest_error(positions_T, RopeConfig(**case["rope"]), case["head_dim"], "exact") < 1e-6).all()


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e7])
def test_float32_angles_are_wrong_at_ten_million(theta):
    """The fault that 'exact' removes, so the tests above can fail."""
    error = largest_error(POSITIONS_T, RopeConfig(theta=theta), 128, "hf_float32")
    assert error[1] < 1e-6 and error[3] > 0.01


def test_plain_float64_frequencies():
    frequency, factor = rotary_frequencies(RopeConfig(theta=5e5), 128)
    np.testing.assert_array_equal(frequency, 1.0 / 5e5 ** (np.arange(0, 128, 2) / 128))
    assert frequency.dtype == np.float64 and factor == 1.0


def test_yarn_ramp_is_float64():
    """A float32 ramp is off by 3e-8: 3e-4 rad at position 10**7 on a pair that turns 1e-3 rad per token."""
    rope = RopeConfig(type="yarn", theta=1e6, factor=4.0, original_positions=32768)
    frequency, factor = rotary_frequencies(rope, 128)
    plain = 1e6 ** -(np.arange(0, 128, 2) / 128)
    low, high = (128 * np.log(32768 / (turns * 2 * np.pi)) / (2 * np.log(1e6)) for turns in (32, 1))
    ramp = np.clip((np.arange(64) - np.floor(low)) / (np.ceil(high) - np.floor(low)), 0, 1)
    np.testing.assert_allclose(frequency, plain / 4 * ramp + plain * (1 - ramp), rtol=1e-14)
    assert factor == 0.1 * np.log(4) + 1


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_float32_tables_are_those_of_transformers(case):
    rope, head_dim = RopeConfig(**case["rope"]), case["head_dim"]
    for dtype, rtol in ((np.float32, 2e-7), (np.float64, 5e-7)):
        frequency, factor = rotary_frequencies(rope, head_dim, dtype)
        np.testing.assert_allclose(frequency, case["inv_freq"], rtol=rtol)
        assert factor == case["attention_factor"] and frequency.dtype == dtype
    positions_T = np.array(EXPECTED["positions"], np.int32)
    cos, sin = compute_tables(positions_T, rope, head_dim, "hf_float32")
    # A frequency one float32 step off (yarn's ramp, where torch fuses the multiply-add) grows with the position.
    step = 2.0**-22 * case["attention_factor"] * (rope.type == "yarn")
    atol = 3e-7 + step * positions_T[:, None] * rotary_frequencies(rope, head_dim)[0]
    assert (np.abs(cos - np.array(case["cos"])) <= atol).all() and (np.abs(sin - np.array(case["sin"])) <= atol).all()


def test_turns_are_accurate_to_64_bits():
    """Fixed-point turns against decimals of 60 digits, with a 2 pi written down independently in base ten."""
    two_pi = decimal.Decimal("6.28318530717958647692528676655900576839433879875021164194988918")
    rope = RopeConfig(theta=5e5)
    upper, lower = rope_module._fixed_point_turns(rope, 128)
    with decimal.localcontext(decimal.Context(prec=60)):
        for pair, frequency in enumerate(rotary_frequencies(rope, 128)[0].tolist()):
            turns = decimal.Decimal(frequency) / two_pi * 2**64
            assert 0 <= turns - ((int(upper[pair]) << 32) + int(lower[pair])) < 1


def test_fraction_of_turn_equals_python_integers():
    rng = np.random.default_rng(1)
    positions_T = np.concatenate([POSITIONS_T, rng.integers(0, 2**31, 200, dtype=np.int32)])
    upper, lower = rng.integers(0, 2**32, (2, 40), dtype=np.uint32)
    upper[:2], lower[:2] = 2**32 - 1, 2**32 - 1
    got = np.asarray(jax.jit(rope_module._fraction_of_turn)(positions_T, upper, lower)).view(np.uint32)
    turns = [(int(u) << 32) + int(v) for u, v in zip(upper, lower, strict=True)]
    assert got.tolist() == [[(p * turn % 2**64) >> 32 for turn in turns] for p in positions_T.tolist()]


def test_rotate_pairs_first_half_with_second_half():
    rng = np.random.default_rng(2)
    x_TNH = rng.standard_normal((5, 3, 8)).astype(np.float32)
    angle = rng.standard_normal((5, 4)).astype(np.float32)
    got = np.asarray(rotate(x_TNH, np.cos(angle), np.sin(angle)))
    turned = (x_TNH[..., :4] + 1j * x_TNH[..., 4:]) * np.exp(1j * angle)[:, None, :]
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-6)
    assert rotate(jnp.asarray(x_TNH, jnp.bfloat16), np.cos(angle), np.sin(angle)).dtype == jnp.bfloat16


def test_scores_depend_on_distance_alone():
    """The law that rotary stands for, far beyond float32's last integer."""
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 1, 1, 64)).astype(np.float32)
    scores = []
    for start in (0, 10**7, 2**24 + 1, 2**31 - 400):
        tables = compute_tables(np.array([start, start + 333], np.int32), RopeConfig(theta=5e5), 64, "exact")
        key, query = (np.asarray(rotate(x, *(table[row : row + 1] for table in tables))) for row, x in ((0, k), (1, q)))
        scores.append((key * query).sum())
    np.testing.assert_allclose(scores, scores[0], atol=2e-5)


def test_runs_inside_shard_map():
    mesh = jax.make_mesh((1,), ("kvp",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec("kvp")
    compute = jax.shard_map(
        lambda positions: rotary_tables(positions, RopeConfig(), 64, "exact"), mesh=mesh, in_specs=spec, out_specs=spec
    )
    with jax.set_mesh(mesh):
        sharded = jax.jit(compute)(jax.device_put(POSITIONS_T, jax.sharding.NamedSharding(mesh, spec)))
    for got, alone in zip(sharded, compute_tables(POSITIONS_T, RopeConfig(), 64, "exact"), strict=True):
        np.testing.assert_array_equal(got, alone)


def test_refusals():
    with pytest.raises(RequestError, match="rope_precision"):
        rotary_tables(jnp.zeros(1, jnp.int32), RopeConfig(), 64, "float16")
    for kind in ("yarn", "llama3"):
        with pytest.raises(RequestError, match="original_positions"):
            rotary_frequencies(RopeConfig(type=kind, factor=2.0), 64)
