"""A layer of linear attention with TPU kernels, in the interpreter, against the same layer in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

import tiny
from maxtext_ling2.host import session
from maxtext_ling2.model.gla import GatedLinearAttention

LENGTH = 60
WIDE = {"head_dim": 128, "group_norm_size": 2, "max_target_length": LENGTH, "per_device_batch_size": 2}
OPTIONS = {
  "as in LING2": {},
  "all dimensions rotated": {"partial_rotary_factor": 1.0},
  "no norm of q and k": {"use_qk_norm": False},
  "silu": {"use_linear_silu": True},
  "one group, offset 1": {"group_norm_size": 1, "gla_decay_layer_offset": 1},
  "heads of 24": {"head_dim": 24},  # nothing fills a register: plain JAX around the kernel
}
SEGMENTS = np.repeat([[1, 2, 0], [3, 3, 4]], LENGTH // 3, axis=1).astype(np.int32)


def output_and_gradients(backend, dtype="float32", **settings):
  """{name: array} of one layer for packed documents."""
  cfg = tiny.config(**{**WIDE, **settings, "gla_backend": backend, "dtype": dtype})
  mesh = session.make_mesh(cfg)
  rng = np.random.default_rng(0)
  x, dy = (jnp.asarray(rng.standard_normal((2, LENGTH, cfg.emb_dim)), dtype) for _ in range(2))
  positions = jnp.asarray(np.tile(np.arange(LENGTH), (2, 1)))
  with session.model_context(cfg, mesh):
    layer = GatedLinearAttention(cfg, mesh, "train", None, nnx.Rngs(0))
    graph, weights, rest = nnx.split(layer, nnx.Param, ...)
    weights = jax.tree.map(lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), weights)

    def run(weights, x):
      return nnx.merge(graph, weights, rest)(x, jnp.asarray(SEGMENTS), positions, 3)

    y, pull = jax.vjp(run, weights, x)
    dweights, dx = pull(dy)
  flat = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(dweights)}
  arrays = {"y": y, "dx": dx} | {name: value.get_value() for name, value in flat.items()}
  return {name: np.asarray(value, np.float64) for name, value in arrays.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fused_is_the_plain_composition(options):
  with pltpu.force_tpu_interpret_mode():
    found = output_and_gradients("pallas", **options)
  expected = output_and_gradients("chunked", **options)
  assert set(found) == set(expected) and len(found) == (8 if options.get("use_qk_norm", True) else 6)
  for name, value in expected.items():
    assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), name


def test_fused_in_bfloat16_is_as_near_to_float32_as_the_plain_composition():
  with pltpu.force_tpu_interpret_mode():
    found = output_and_gradients("pallas", "bfloat16")
  plain, exact = output_and_gradients("chunked", "bfloat16"), output_and_gradients("chunked")
  for name, value in exact.items():
    ours, theirs = (np.linalg.norm(x[name] - value) / np.linalg.norm(value) for x in (found, plain))
    assert ours < 0.02 and ours < 1.1 * theirs + 1e-3, name
