"""Layers in bfloat16 against themselves in float32: the acceptance numbers of the origin's RFCs.

Both sides have the same weights, inputs and cotangents, all of them numbers of bfloat16. Inputs are N(0, 1), as after a
norm; weights are as MaxText draws them. One ULP is the step from one number of bfloat16 to the next.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.model.gla import GatedLinearAttention
from maxtext_ling2.model.mla import MultiHeadLatentAttention
from maxtext_ling2.model.moe import Ling2MoE

LENGTH = 250  # no multiple of a chunk
WIDTH = 256
SIZES = {"base_emb_dim": WIDTH, "max_target_length": LENGTH, "per_device_batch_size": 1, "group_norm_size": 4}
SIZES |= {"head_dim": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
SIZES |= {"q_lora_rank": 128, "kv_lora_rank": 128, "num_experts": 16, "num_experts_per_tok": 4, "base_moe_mlp_dim": 128}
SIZES |= {"moe_shared_expert_dim": 256}
POSITIONS = np.arange(LENGTH)[None]


def rounded(x):
  """float32 -> the next number of bfloat16, as float32."""
  return jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)


def normal(seed):
  """[1, T, C] float32."""
  return rounded(np.random.default_rng(seed).standard_normal((1, LENGTH, WIDTH)))


def layer_in(dtype, make, **settings):
  """(layer, its mesh and rules); make(config, mesh, rngs)."""
  precision = {"matmul_precision": "default"} if dtype == "bfloat16" else {}
  cfg = tiny.config(**SIZES, **settings, dtype=dtype, **precision)
  mesh = session.make_mesh(cfg)
  with session.model_context(cfg, mesh):
    layer = make(cfg, mesh, nnx.Rngs(0))
  nnx.update(layer, jax.tree.map(rounded, nnx.state(layer, nnx.Param)))
  return layer, session.model_context(cfg, mesh)


def gla(cfg, mesh, rngs):
  return GatedLinearAttention(cfg, mesh, "train", None, rngs)


def mla(cfg, mesh, rngs):
  return MultiHeadLatentAttention(cfg, mesh, "train", None, (1, LENGTH, WIDTH), rngs)


def moe(cfg, mesh, rngs):
  return Ling2MoE(cfg, mesh, None, rngs)


def ulps(x, y):
  """Numbers of bfloat16 between x and y, each rounded to it first."""

  def place(x):
    bits = np.asarray(jnp.asarray(x, jnp.bfloat16)).view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)

  return np.abs(place(x) - place(y))


def relative_l2(x, exact):
  return np.linalg.norm(x - exact) / np.linalg.norm(exact)


def cosine(x, y):
  return np.vdot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y))


def outside(x, exact, atol, rtol):
  """Share of elements further off than atol + rtol |exact|, and more than 2 ULP."""
  off = np.abs(x - exact) > atol + rtol * np.abs(exact)
  return np.mean(off & (ulps(x, exact) > 2))


@functools.cache
def gla_arrays(dtype):
  """{name: array} of one GLA layer: output y, gradient dx, gradients of weights, for cotangents N(0, 1)."""
  layer, context = layer_in(dtype, gla)
  graph, weights, rest = nnx.split(layer, nnx.Param, ...)

  @jax.jit
  def run(weights, x, dy):
    y, pull = jax.vjp(lambda weights, x: nnx.merge(graph, weights, rest)(x, None, POSITIONS, 1), weights, x)
    return y, *pull(dy)

  with context:
    y, dweights, dx = run(weights, *(normal(seed).astype(dtype) for seed in (0, 1)))
  flat = {path[-2]: value.get_value() for path, value in nnx.to_flat_state(dweights)}
  return {name: np.asarray(value, np.float64) for name, value in ({"y": y, "dx": dx} | flat).items()}


# On CPUs XLA adds up the gradient of jnp.dot(x [B, T, C], w) over B and T in bfloat16: 2e-2 of it is off after 250 tokens
# (2e-3 where it adds in float32, as on TPUs).
ADDED_IN_BFLOAT16 = ("query_key_value", "output_gate")


def test_gla():
  """The RFC's absolute bounds need a scale. y has an rms of 0.5. Gradients are compared for cotangents that belong to a
  mean over tokens: over 256 of them for weights (rms 0.01 to 0.08), over 4096 for inputs (rms 2e-4), of which each
  gradient is a multiple: products with powers of two are exact.

  The share of elements that may be off by more is the RFC's for weights; y needs it too, as it is rounded about 20 times,
  by 2^-9 / sqrt(3) of an element on average: 5e-3 of one with |y| = 2 is all of the bound.
  """
  ours, exact = map(gla_arrays, ("bfloat16", "float32"))
  assert set(ours) == {"y", "dx", "query_norm", "key_norm", "output_norm", "out", *ADDED_IN_BFLOAT16}
  assert outside(ours["y"], exact["y"], 1e-2, 1e-3) < 1e-3
  np.testing.assert_allclose(ours["dx"] / 4096, exact["dx"] / 4096, rtol=1.6e-2, atol=1e-5)
  for name in set(exact) - {"y", "dx"}:
    assert outside(ours[name] / 256, exact[name] / 256, 1e-2, 1e-4) < 1e-3, name


def test_gla_whole_arrays():
  """The bound of the other layers, which needs no scale."""
  ours, exact = map(gla_arrays, ("bfloat16", "float32"))
  for name, value in exact.items():
    assert relative_l2(ours[name], value) < (2.5e-2 if name in ADDED_IN_BFLOAT16 else 1e-2), name


def mla_output(dtype):
  layer, context = layer_in(dtype, mla)
  graph, state = nnx.split(layer)
  options = {"decoder_segment_ids": np.ones_like(POSITIONS), "deterministic": True, "model_mode": "train"}
  with context:
    y = jax.jit(lambda state, x: nnx.merge(graph, state)(x, x, POSITIONS, **options)[0])(state, normal(0).astype(dtype))
  return np.asarray(y, np.float64)


def test_mla():
  ours, exact = map(mla_output, ("bfloat16", "float32"))
  assert cosine(ours, exact) > 0.9999
  assert np.percentile(ulps(ours, exact), 99) < 100
  assert relative_l2(ours, exact) < 1e-2


def moe_output(dtype, sparse):
  """(y [1, T, C], experts [1, T, k])"""
  layer, context = layer_in(dtype, moe, sparse_matmul=sparse)
  graph, state = nnx.split(layer)

  def run(state, x):
    layer = nnx.merge(graph, state)
    routed = layer.MoeBlock_0
    return layer(x, deterministic=True)[0], routed.get_topk(*routed.gate(x))[1]

  with context:
    y, experts = jax.jit(run)(state, normal(0).astype(dtype))
  return np.asarray(y, np.float64), np.asarray(experts)


@pytest.mark.parametrize("sparse", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_moe(sparse):
  (ours, chosen), (exact, expected) = (moe_output(dtype, sparse) for dtype in ("bfloat16", "float32"))
  np.testing.assert_array_equal(chosen, expected)
  assert cosine(ours, exact) > 0.999
  assert relative_l2(ours, exact) < 0.01
