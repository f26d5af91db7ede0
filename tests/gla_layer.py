"""One GLA layer on packed documents, forward and backward, under the settings of a test."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tiny
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.model.gla import GatedLinearAttention

LENGTH = 60
WIDE = {"head_dim": 128, "group_norm_size": 2, "max_target_length": LENGTH, "per_device_batch_size": 2}
SEGMENTS = np.repeat([[1, 2, 0], [3, 3, 4]], LENGTH // 3, axis=1).astype(np.int32)


def output_and_gradients(backend, dtype="float32", kind=GatedLinearAttention, **settings):
  """{name: array} of one layer for packed documents."""
  run, arguments, context = _layer(backend, dtype, settings, kind)
  with context:
    y, dweights, dx = run(*arguments)
  flat = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(dweights)}
  arrays = {"y": y, "dx": dx} | {name: value.get_value() for name, value in flat.items()}
  return {name: np.asarray(value, np.float64) for name, value in arrays.items()}


def prompt_and_step(backend):
  """{name: array} of a prompt of 41 tokens, padded, and of the token after it."""
  cfg = tiny.config(**WIDE, gla_backend=backend, max_prefill_predict_length=LENGTH)
  mesh = session.make_mesh(cfg)
  rng = np.random.default_rng(0)
  prompt, token = (jnp.asarray(rng.standard_normal((1, n, cfg.emb_dim)), jnp.float32) for n in (LENGTH, 1))
  index = jnp.arange(LENGTH)[None]
  segments = (index < 41).astype(jnp.int32)
  with session.model_context(cfg, mesh):
    layer = GatedLinearAttention(cfg, mesh, "prefill", None, nnx.Rngs(0))
    y = layer(prompt, segments, index * segments, 3, "prefill")
    state = layer.recurrent_state[...]
    step = layer(token, None, jnp.full((1, 1), 41), 3, "autoregressive")
  arrays = {"y": y[:, :41], "state": state, "step": step, "next state": layer.recurrent_state[...]}
  return {name: np.asarray(value, np.float64) for name, value in arrays.items()}


def kernels(backend, **settings):
  """Names of the kernels in the layer with its gradients."""
  run, arguments, context = _layer(backend, "float32", settings)
  with context:
    text = str(jax.make_jaxpr(run)(*arguments))
  return set(re.findall(r"name=((?:gla|rotated|gated)_\w+)$", text, re.MULTILINE))


def _layer(backend, dtype, settings, kind=GatedLinearAttention):
  """(weights, x, dy) -> output and gradients; these arguments; the mesh and its rules."""
  cfg = tiny.config(**{**WIDE, **settings, "gla_backend": backend, "dtype": dtype})
  mesh = session.make_mesh(cfg)
  rng = np.random.default_rng(0)
  x, dy = (jnp.asarray(rng.standard_normal((2, LENGTH, cfg.emb_dim)), dtype) for _ in range(2))
  positions = jnp.asarray(np.tile(np.arange(LENGTH), (2, 1)))
  with session.model_context(cfg, mesh):
    layer = kind(cfg, mesh, "train", None, nnx.Rngs(0))
  graph, weights, rest = nnx.split(layer, nnx.Param, ...)
  weights = jax.tree.map(lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), weights)

  def forward(weights, x):
    return nnx.merge(graph, weights, rest)(x, jnp.asarray(SEGMENTS), positions, 3)

  def run(weights, x, dy):
    y, pull = jax.vjp(forward, weights, x)
    return y, *pull(dy)

  return run, (weights, x, dy), session.model_context(cfg, mesh)
