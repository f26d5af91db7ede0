"""`matmul_precision` for the products of float32 to which MaxText does not pass it.

Those are the routed experts (`jax.lax.ragged_dot`, and the kernels of grouped products) and MTP's projection. On a TPU
and a GPU they would round their operands, to bfloat16 and TF32, whatever the config says.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp


def matmul_precision(config: Any) -> contextlib.AbstractContextManager[Any]:
  """Within it, products of float32 that name no precision have the config's.

  With bfloat16 it changes nothing: those products are exact at every precision, and kernels refuse another.
  """
  precision = jax.lax.Precision(config.matmul_precision)
  if precision == jax.lax.Precision.DEFAULT or jnp.dtype(config.dtype) != jnp.float32:
    return contextlib.nullcontext()
  return jax.default_matmul_precision(precision.name.lower())
