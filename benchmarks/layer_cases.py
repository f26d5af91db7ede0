"""Parts of a LING2 layer as programs for `tpu_static`: the plugin's modules, one device, bfloat16."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.layers.embeddings import RotaryEmbedding
from maxtext.layers.multi_token_prediction import MultiTokenPredictionLayer

from maxtext_ling2.maxtext_api import session
from maxtext_ling2.model.gla import GatedLinearAttention
from maxtext_ling2.model.layer import Ling2MtpLayer
from maxtext_ling2.model.mla import MultiHeadLatentAttention
from maxtext_ling2.model.moe import Ling2MoE, Router
from maxtext_ling2.model.sharded_gla import sharded_gla
from maxtext_ling2.ops.gla import log_decay

Program = tuple[Callable[..., Any], tuple[Any, ...]]

SETTINGS = {"model_name": "ling2", "per_device_batch_size": 1, "weight_dtype": "bfloat16", "gla_backend": "pallas"}
SETTINGS |= {"attention": "flash"}


class PlainComposition(GatedLinearAttention):
  """The same layer as a sequence of modules on [B, T, H, D], with only GLA itself as a kernel.

  For training. The baseline of `GatedLinearAttention`.
  """

  def __call__(
    self, x: jax.Array, segment_ids: Any, positions: jax.Array, layer_index: Any, model_mode: str = "train"
  ) -> Any:
    cfg = self.config
    q, k, v = jnp.moveaxis(self.query_key_value(x), 2, 0)
    q, k = (self._rotated(norm(part), positions) for norm, part in ((self.query_norm, q), (self.key_norm, k)))
    g_gamma = log_decay(layer_index, cfg.num_decoder_layers, cfg.num_query_heads, cfg.gla_decay_layer_offset)
    o, _ = sharded_gla(q, k, v, jnp.asarray(g_gamma), segment_ids, mesh=self.mesh, backend=cfg.gla_backend)
    groups = o.astype(jnp.float32).reshape(*x.shape[:2], cfg.group_norm_size, -1)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(groups), axis=-1, keepdims=True) + cfg.normalization_layer_epsilon)
    normed = (groups * rstd).reshape(*x.shape[:2], -1) * self.output_norm.scale[...].astype(jnp.float32)
    gate = jax.nn.sigmoid(self.output_gate(x).astype(jnp.float32))
    return self.out((normed.reshape(gate.shape) * gate).astype(cfg.dtype))

  def _rotated(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    part = x[..., : self.rotary_dims].astype(jnp.float32)
    rotated = RotaryEmbedding.__call__(self.rotary_embedding, part, positions)  # MaxText's own
    return jnp.concatenate([rotated.astype(x.dtype), x[..., self.rotary_dims :]], axis=-1)


@functools.cache
def _config(length: int) -> Any:
  return session.make_config(**SETTINGS, max_target_length=length)


MESH_AXES = tuple(_config(4096).mesh_axes)
"""Axes of the mesh that `tpu_static` makes."""


def gla_layer(length: int = 4096, *, gradients: bool = False, plain: bool = False) -> Program:
  """A layer of linear attention, or with `plain` the composition of modules."""
  kind = PlainComposition if plain else GatedLinearAttention
  return _program(
    length,
    gradients,
    lambda config, mesh: kind(config, mesh, "train", None, nnx.Rngs(0)),
    lambda layer, x, positions: layer(x, None, positions, 3),
  )


def mla_layer(length: int = 4096, *, gradients: bool = False) -> Program:
  """MLA, with MaxText's flash attention; one document per sequence."""
  return _program(
    length,
    gradients,
    lambda config, mesh: MultiHeadLatentAttention(config, mesh, "train", None, (1, length, config.emb_dim), nnx.Rngs(0)),
    lambda layer, x, positions: layer(
      x, x, positions, decoder_segment_ids=jnp.ones_like(positions), deterministic=True, model_mode="train"
    )[0],
  )


def router(length: int = 4096, *, gradients: bool = False) -> Program:
  """Scores of all experts, float32."""
  return _program(length, gradients, lambda config, mesh: Router(config, nnx.Rngs(0)), lambda layer, x, _: layer(x)[0])


def shared_expert(length: int = 4096, *, gradients: bool = False) -> Program:
  """The expert of all tokens."""
  return _program(
    length,
    gradients,
    lambda config, mesh: Ling2MoE(config, mesh, None, nnx.Rngs(0)).shared_experts,
    lambda layer, x, _: layer(x, deterministic=True),
  )


def mtp_input(length: int = 4096, *, gradients: bool = False) -> Program:
  """The input of an MTP layer's decoder layer: two norms, concatenated, and a projection."""

  def make(config: Any, mesh: Any) -> nnx.Module:
    layer = MultiTokenPredictionLayer(config, mesh, 1, Ling2MtpLayer, rngs=nnx.Rngs(0))
    delattr(layer, "mtp_1_transformer_layer")  # its gradients would be zeros, but written
    return layer

  def call(layer: Any, x: jax.Array, _: jax.Array) -> jax.Array:
    normed = layer.embedding_norm(x), layer.hidden_state_norm(x)
    return layer.projection_layer(jnp.concatenate(normed, axis=-1))

  return _program(length, gradients, make, call)


def _program(length: int, gradients: bool, make: Callable[..., Any], call: Callable[..., jax.Array]) -> Program:
  """x [1, T, C] -> y, or with `gradients` (x, dy) -> y, gradients of all weights and of x."""
  config = _config(length)
  mesh = jax.sharding.get_mesh()
  with session.model_context(config, mesh):
    abstract = nnx.eval_shape(lambda: make(config, mesh))
  graph, weights, rest = nnx.split(abstract, nnx.Param, ...)
  x = jax.ShapeDtypeStruct((1, length, config.emb_dim), jnp.bfloat16)
  positions = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def forward(weights: Any, rest: Any, x: Any, positions: Any) -> Any:
    with logical_axis_rules(config.logical_axis_rules):
      return call(nnx.merge(graph, weights, rest), x, positions)

  def both(weights: Any, rest: Any, x: Any, positions: Any, dy: Any) -> Any:
    y, pull = jax.vjp(lambda weights, x: forward(weights, rest, x, positions), weights, x)
    return y, pull(dy.astype(y.dtype))

  arguments = tuple(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (weights, rest, x, positions)))
  if not gradients:
    return forward, arguments
  y = jax.eval_shape(forward, *arguments)
  return both, (*arguments, jax.ShapeDtypeStruct(y.shape, jnp.bfloat16))
