"""GLA over shards of a sequence equals GLA over the whole; the shards are a named axis of `jax.vmap`, on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxtext_ling2.ops.gla import gla, gla_context_parallel

BATCH, LENGTH, HEADS, DIM = 2, 48, 3, 8
G_GAMMA = np.log(np.array([0.5, 0.9, 0.999], np.float32))


def inputs(seed, dtype=jnp.float32):
  """q, k, v and an initial state."""
  rng = np.random.default_rng(seed)
  q, k, v = (jnp.asarray(rng.normal(size=(BATCH, LENGTH, HEADS, DIM)), dtype) for _ in range(3))
  return q, k, v, jnp.asarray(rng.normal(size=(BATCH, HEADS, DIM, DIM)), jnp.float32)


def packed(seed):
  """Random documents and padding, also at the ends of shards and in the middle; an id that comes back."""
  rng = np.random.default_rng(seed)
  rows = []
  for _ in range(BATCH):
    borders = np.sort(rng.choice(np.arange(1, LENGTH), rng.integers(0, 6), replace=False))
    rows.append(np.searchsorted(borders, np.arange(LENGTH), side="right"))
  ids = np.stack(rows)
  return jnp.asarray(rng.integers(0, 3, (BATCH, 7))[np.arange(BATCH)[:, None], ids], jnp.int32)


def split(x, ranks):
  """[B, T, ...] -> [N, B, T / N, ...]"""
  return x if x is None else jnp.moveaxis(x.reshape(BATCH, ranks, LENGTH // ranks, *x.shape[2:]), 1, 0)


def sharded(q, k, v, state, ids, ranks, backend="chunked"):
  """o [B, T, H, D] and the final states of all ranks [N, B, H, D, D]."""
  run = functools.partial(gla_context_parallel, axis_name="ranks", output_final_state=True, backend=backend)

  def one(q, k, v, ids):
    return run(q, k, v, G_GAMMA, segment_ids=ids, initial_state=state)

  axes = (0, 0, 0, None if ids is None else 0)
  o, final = jax.vmap(one, axes, axis_name="ranks")(*(split(x, ranks) for x in (q, k, v, ids)))
  return jnp.moveaxis(o, 0, 1).reshape(BATCH, LENGTH, HEADS, DIM), final


def whole(q, k, v, state, ids, backend="reference"):
  return gla(q, k, v, G_GAMMA, segment_ids=ids, initial_state=state, output_final_state=True, backend=backend)


def compare(ours, expected, tolerance):
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert np.linalg.norm(one - other) <= tolerance * max(np.linalg.norm(other), 1.0)


def check(ids, ranks, dtype, tolerance, seed=0, with_state=True):
  """Values and all gradients."""
  q, k, v, state = inputs(seed, dtype)
  state = state if with_state else None
  rng = np.random.default_rng(seed + 1)
  weights = jnp.asarray(rng.normal(size=(BATCH, LENGTH, HEADS, DIM))), jnp.asarray(rng.normal(size=(HEADS, DIM, DIM)))

  def loss(run, *args):
    o, final = run(*args)
    final = final[-1] if final.ndim == 5 else final
    return (o.astype(jnp.float32) * weights[0]).sum() + (final * weights[1]).sum(), (o, final)

  wanted = (0, 1, 2, 3) if with_state else (0, 1, 2)
  ours = jax.grad(lambda *x: loss(lambda *y: sharded(*y, ids, ranks), *x), wanted, has_aux=True)(q, k, v, state)
  expected = jax.grad(lambda *x: loss(lambda *y: whole(*y, ids), *x), wanted, has_aux=True)(q, k, v, state)
  compare(ours, expected, tolerance)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("with_state", [True, False])
def test_one_document(ranks, with_state):
  check(None, ranks, jnp.float32, 1e-5, with_state=with_state)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_packed(ranks, seed):
  check(packed(seed), ranks, jnp.float32, 1e-5, seed)


@settings(max_examples=15, deadline=None)
@given(
  st.lists(st.integers(0, 2), min_size=BATCH * LENGTH // 4, max_size=BATCH * LENGTH // 4), st.sampled_from([2, 4, 8])
)
def test_any_ids(ids, ranks):
  """Also shards of padding only, and documents that go on across them."""
  ids = jnp.repeat(jnp.asarray(ids, jnp.int32).reshape(BATCH, -1), 4, axis=1)
  q, k, v, state = inputs(0)
  o, final = sharded(q, k, v, state, ids, ranks)
  expected, expected_final = whole(q, k, v, state, ids)
  compare((o, final[0], final[-1]), (expected, expected_final, expected_final), 1e-5)


def test_bfloat16():
  check(packed(0), 4, jnp.bfloat16, 0.01)


def test_padding_may_hold_anything():
  ids = packed(1)
  q, k, v, state = inputs(0)
  bad = jnp.where((ids == 0)[..., None, None], jnp.nan, 0.0)
  compare(sharded(q + bad, k + bad, v + bad, state, ids, 4), sharded(q, k, v, state, ids, 4), 0.0)
