"""Norm and rotation of q and k, norm and gate of outputs: plain JAX against a closed form, TPU kernels against plain JAX.

The kernels run in an interpreter that fills with NaN what they must not read.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from maxtext_ling2.ops.fused_norm import grouped_rms_norm_gated, qk_norm_rope

EPSILON = 1e-6


@pytest.fixture(autouse=True)
def interpreted():
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    yield
  assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
  pltpu.reset_tpu_interpret_mode_state()


def random(seed, *shape, dtype=np.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tables(batch, length, dim, rotated):
  angle = np.random.default_rng(9).uniform(0, 100, (batch, length, rotated // 2))
  rest = np.zeros((batch, length, dim - rotated))
  cos, sin = np.cos(angle), np.sin(angle)
  parts = [cos, cos, rest + 1], [-sin, sin, rest]
  return tuple(jnp.asarray(np.concatenate(x, axis=-1), jnp.float32) for x in parts)


def rotation_case(length, heads, dim, rotated, norm, dtype=np.float32):
  """(function of the backend, operands)"""
  cos, sin = tables(2, length, dim, rotated)
  operands = (random(0, 2, length, heads * dim, dtype=dtype), random(1, dim) if norm else None)

  def run(backend):
    return lambda x, scale: qk_norm_rope(x, scale, cos, sin, rotated=rotated, epsilon=EPSILON, backend=backend)

  return run, operands


def gate_case(length, columns, groups, dtype=np.float32):
  operands = (*(random(seed, 2, length, columns, dtype=dtype) for seed in (2, 3)), random(4, columns))
  return lambda backend: functools.partial(
    grouped_rms_norm_gated, groups=groups, epsilon=EPSILON, backend=backend
  ), operands


def values_and_gradients(function, operands):
  y, pull = jax.vjp(function, *operands)
  dy = random(5, *y.shape, dtype=jnp.bfloat16).astype(y.dtype)
  return [np.asarray(x, np.float64) for x in jax.tree.leaves((y, pull(dy)))]


def error(found, expected):
  """Largest error relative to the largest value."""
  return np.abs(found - expected).max() / np.abs(expected).max()


ROTATIONS = [  # length, heads, dim, rotated, norm
  (300, 3, 128, 64, True),  # two blocks of tokens, the second beyond the end
  (300, 17, 128, 128, True),  # more columns than a block has, a number of heads that nothing divides
  (1, 1, 128, 32, True),
  (40, 2, 128, 64, False),
  (40, 8, 32, 16, True),  # four heads fill a block
  pytest.param((40, 2, 128, 64, True), marks=pytest.mark.slow),
  pytest.param((17, 2, 256, 128, True), marks=pytest.mark.slow),
  pytest.param((300, 2, 64, 64, True), marks=pytest.mark.slow),
  pytest.param((40, 16, 8, 4, False), marks=pytest.mark.slow),
]
GATES = [  # length, columns, groups
  (300, 4096, 8),  # two blocks of columns
  (100, 2 * 6144, 2),  # a group is wider than a block of columns, and a block of fewer tokens
  (1, 128, 1),
  (40, 128, 2),  # two groups fill a block
  pytest.param((40, 512, 4), marks=pytest.mark.slow),
  pytest.param((300, 512, 1), marks=pytest.mark.slow),
  pytest.param((300, 512, 16), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", ROTATIONS, ids=str)
def test_qk_norm_rope_kernels_are_plain_jax(case):
  run, operands = rotation_case(*case)
  for found, expected in zip(*(values_and_gradients(run(name), operands) for name in ("pallas", "chunked")), strict=True):
    assert error(found, expected) < 2e-6


@pytest.mark.parametrize("case", GATES, ids=str)
def test_grouped_rms_norm_gated_kernels_are_plain_jax(case):
  run, operands = gate_case(*case)
  for found, expected in zip(*(values_and_gradients(run(name), operands) for name in ("pallas", "chunked")), strict=True):
    assert error(found, expected) < 2e-6


@pytest.mark.parametrize("backend", ["chunked", "pallas", "auto"])
@pytest.mark.parametrize("make", [lambda d: rotation_case(40, 2, 128, 64, True, d), lambda d: gate_case(40, 512, 2, d)])
def test_bfloat16_rounds_once(backend, make):
  """The result is the float32 result of the rounded operands, rounded; gradients likewise."""
  run, operands = make(jnp.bfloat16)
  widened = [x.astype(jnp.float32) for x in operands]
  rounding = 2.0**-8
  for found, expected in zip(
    values_and_gradients(run(backend), operands), values_and_gradients(run("chunked"), widened), strict=True
  ):
    assert np.all(np.abs(found - expected) <= rounding * (np.abs(expected) + np.abs(expected).max() / 16))


@pytest.mark.parametrize("backend", ["chunked", "pallas"])
def test_qk_norm_rope_closed_form(backend):
  run, (x, scale) = rotation_case(12, 2, 128, 64, True)
  cos, sin = (np.asarray(table, np.float64)[:, :, None] for table in tables(2, 12, 128, 64))
  heads = np.asarray(x, np.float64).reshape(2, 12, 2, 128)
  normed = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + EPSILON) * np.asarray(scale, np.float64)
  pairs = normed[..., :32] + 1j * normed[..., 32:64]  # a rotation is a product of complex numbers
  rotated = pairs * (cos[..., :32] + 1j * sin[..., 32:64])
  expected = np.concatenate([rotated.real, rotated.imag, normed[..., 64:]], axis=-1).reshape(x.shape)
  assert error(np.asarray(run(backend)(x, scale)), expected) < 1e-6


@pytest.mark.parametrize("backend", ["chunked", "pallas"])
def test_grouped_rms_norm_gated_closed_form(backend):
  run, (x, gate, scale) = gate_case(12, 256, 2)
  groups = np.asarray(x, np.float64).reshape(2, 12, 2, 128)
  normed = (groups / np.sqrt((groups**2).mean(-1, keepdims=True) + EPSILON)).reshape(x.shape)
  expected = normed * np.asarray(scale, np.float64) / (1 + np.exp(-np.asarray(gate, np.float64)))
  assert error(np.asarray(run(backend)(x, gate, scale)), expected) < 1e-6


def test_rotating_back_undoes_it_and_norms_stay():
  cos, sin = tables(2, 12, 128, 64)
  x = random(0, 2, 12, 256)
  turn = functools.partial(qk_norm_rope, rotated=64, epsilon=EPSILON, backend="pallas")
  there = turn(x, None, cos, sin)
  np.testing.assert_allclose(turn(there, None, cos, -sin), x, atol=1e-6)
  np.testing.assert_allclose(jnp.linalg.norm(there), jnp.linalg.norm(x), rtol=1e-6)


@pytest.mark.parametrize("make", [lambda: rotation_case(9, 1, 128, 64, True), lambda: gate_case(9, 128, 1)])
def test_gradients_of_gradients(make):
  run, operands = make()

  def slope(backend, *operands):
    return jnp.sum(jax.grad(lambda *x: jnp.sum(run(backend)(*x) ** 3))(*operands) ** 2)

  found, expected = (jax.grad(functools.partial(slope, name))(*operands) for name in ("pallas", "chunked"))
  assert error(np.asarray(found), np.asarray(expected)) < 1e-5


def test_what_does_not_fit_is_named():
  run, (x, scale) = rotation_case(12, 2, 128, 64, True)
  with pytest.raises(ValueError, match=r"qk_norm_rope: cos has shape \(2, 12, 128\), expected \(1, 12, 128\)"):
    run("pallas")(x[:1], scale)
  with pytest.raises(ValueError, match="x has 192 columns, not a whole number of heads of 128"):
    run("pallas")(x[..., :192], scale)
  with pytest.raises(ValueError, match=r"qk_norm_rope: scale has shape \(64,\), expected \(128,\)"):
    run("pallas")(x, scale[:64])
  with pytest.raises(ValueError, match=r"grouped_rms_norm_gated: gate has shape \(2, 12, 128\), expected \(2, 12, 256\)"):
    grouped_rms_norm_gated(x, x[..., :128], jnp.ones(256), groups=2, epsilon=EPSILON)
  with pytest.raises(ValueError, match="groups=3 does not divide the 256 columns"):
    grouped_rms_norm_gated(x, x, jnp.ones(256), groups=3, epsilon=EPSILON)
