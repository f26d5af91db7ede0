"""The GLA layer of LING2 as a program for `tpu_static`: MaxText's module, one device, bfloat16."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import logical_axis_rules

from maxtext_ling2.host import session
from maxtext_ling2.model.gla import GatedLinearAttention
from maxtext_ling2.model.sharded_gla import sharded_gla
from maxtext_ling2.ops.gla import log_decay

Program = tuple[Callable[..., Any], tuple[Any, ...]]

SETTINGS = {"model_name": "ling2", "per_device_batch_size": 1, "weight_dtype": "bfloat16", "gla_backend": "pallas"}


class PlainComposition(GatedLinearAttention):
  """The same layer as one writes it at first: modules in a row on [B, T, H, D], only GLA itself as a kernel.

  For training; the plugin's own layer until issue 9.
  """

  def __call__(
    self, x: jax.Array, segment_ids: Any, positions: jax.Array, layer_index: Any, model_mode: str = "train"
  ) -> Any:
    cfg = self.config
    q, k, v = jnp.moveaxis(self.query_key_value(x), 2, 0)
    q, k = (self._rotated(norm(part), positions) for norm, part in ((self.query_norm, q), (self.key_norm, k)))
    decay = log_decay(layer_index, cfg.num_decoder_layers, cfg.num_query_heads, cfg.gla_decay_layer_offset)
    o, _ = sharded_gla(q, k, v, jnp.asarray(decay), segment_ids, mesh=self.mesh, backend=cfg.gla_backend)
    groups = o.astype(jnp.float32).reshape(*x.shape[:2], cfg.group_norm_size, -1)
    root = jax.lax.rsqrt(jnp.mean(jnp.square(groups), axis=-1, keepdims=True) + cfg.normalization_layer_epsilon)
    normed = (groups * root).reshape(*x.shape[:2], -1) * self.output_norm.scale[...].astype(jnp.float32)
    gate = jax.nn.sigmoid(self.output_gate(x).astype(jnp.float32))
    return self.out((normed.reshape(gate.shape) * gate).astype(cfg.dtype))

  def _rotated(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    rotated = self.rotary_embedding(x[..., : self.rotary_dims], positions)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., self.rotary_dims :]], axis=-1)


@functools.cache
def _config(length: int) -> Any:
  return session.make_config(**SETTINGS, max_target_length=length)


MESH_AXES = tuple(_config(4096).mesh_axes)
"""Axes of the mesh that `tpu_static` makes."""


def gla_layer(length: int = 4096, *, gradients: bool = False, plain: bool = False) -> Program:
  """x [1, T, C] -> y, or with `gradients` (x, dy) -> y, gradients of all weights and of x."""
  config = _config(length)
  mesh = jax.sharding.get_mesh()
  kind = PlainComposition if plain else GatedLinearAttention
  with session.model_context(config, mesh):
    abstract = nnx.eval_shape(lambda: kind(config, mesh, "train", None, nnx.Rngs(0)))
  graph, weights, rest = nnx.split(abstract, nnx.Param, ...)
  x = jax.ShapeDtypeStruct((1, length, config.emb_dim), jnp.bfloat16)
  positions = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def forward(weights: Any, rest: Any, x: Any, positions: Any) -> Any:
    with logical_axis_rules(config.logical_axis_rules):
      return nnx.merge(graph, weights, rest)(x, None, positions, 3)

  def both(weights: Any, rest: Any, x: Any, positions: Any, dy: Any) -> Any:
    y, pull = jax.vjp(lambda weights, x: forward(weights, rest, x, positions), weights, x)
    return y, pull(dy)

  arguments = tuple(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (weights, rest, x, positions)))
  return (both, (*arguments, x)) if gradients else (forward, arguments)
