"""The GLA layer of LING2 as a program for `tpu_static`: MaxText's module, one device, bfloat16."""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import logical_axis_rules

from maxtext_ling2.host import session
from maxtext_ling2.model.gla import GatedLinearAttention
from maxtext_ling2.ops.gla import stages

Program = tuple[Callable[..., Any], tuple[Any, ...]]

SETTINGS = {"model_name": "ling2", "per_device_batch_size": 1, "weight_dtype": "bfloat16", "gla_backend": "pallas"}


@functools.cache
def _config(length: int) -> Any:
  return session.make_config(**SETTINGS, max_target_length=length)


MESH_AXES = tuple(_config(4096).mesh_axes)
"""Axes of the mesh that `tpu_static` makes."""


def gla_layer(length: int = 4096, *, gradients: bool = False, plain: bool = False) -> Program:
  """x [1, T, C] -> y, or with `gradients` (x, dy) -> y, gradients of all weights and of x.

  With `plain` only linear attention itself is a kernel, and what stands around it is plain JAX.
  """
  config = _config(length)
  mesh = jax.sharding.get_mesh()
  with session.model_context(config, mesh):
    abstract = nnx.eval_shape(lambda: GatedLinearAttention(config, mesh, "train", None, nnx.Rngs(0)))
  graph, weights, rest = nnx.split(abstract, nnx.Param, ...)
  x = jax.ShapeDtypeStruct((1, length, config.emb_dim), jnp.bfloat16)
  positions = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def forward(weights: Any, rest: Any, x: Any, positions: Any) -> Any:
    no_width = 2**30 if plain else stages._LANES
    with logical_axis_rules(config.logical_axis_rules), mock.patch.object(stages, "_LANES", no_width):
      return nnx.merge(graph, weights, rest)(x, None, positions, 3)

  def both(weights: Any, rest: Any, x: Any, positions: Any, dy: Any) -> Any:
    y, pull = jax.vjp(lambda weights, x: forward(weights, rest, x, positions), weights, x)
    return y, pull(dy)

  arguments = tuple(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (weights, rest, x, positions)))
  return (both, (*arguments, x)) if gradients else (forward, arguments)
