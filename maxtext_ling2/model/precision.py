"""`matmul_precision` for the float32 matmuls to which MaxText does not pass it.

Those are the routed experts (`jax.lax.ragged_dot` and the grouped matmul kernels) and MTP's projection. Without it a TPU
rounds their operands to bfloat16 and a GPU to TF32, whatever the config says.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp


def matmul_precision(config: Any) -> contextlib.AbstractContextManager[Any]:
  """A context in which float32 matmuls without a precision of their own have the config's.

  With dtype bfloat16 it changes nothing: such matmuls are exact at every precision, and kernels refuse any but the
  default.
  """
  precision = jax.lax.Precision(config.matmul_precision)
  if precision == jax.lax.Precision.DEFAULT or jnp.dtype(config.dtype) != jnp.float32:
    return contextlib.nullcontext()
  return jax.default_matmul_precision(precision.name.lower())
