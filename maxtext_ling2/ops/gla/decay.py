"""The constant decay of each GLA head: a slope per head, scaled by the depth of the layer.

The slopes are the geometric ones of ALiBi (Press et al. 2022); deeper layers decay more slowly (lightning attention,
Qin et al. 2024). Nothing here is a parameter.
"""

import functools
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

# Keeps the slope of the deepest layer above zero; the released models were trained with it.
_SLOPE_FLOOR = 1e-5


def slopes(num_heads: int) -> NDArray[np.float64]:
  """Slopes per head, before the scaling by depth.

  Args:
    num_heads: number of heads H, at least 1; need not be a power of two.

  Returns:
    [H] float64, positive.

  Raises:
    ValueError: num_heads is below 1.
  """
  if num_heads < 1:
    raise ValueError(f"slopes: num_heads is {num_heads}, expected at least 1.")
  power = 1 << (num_heads.bit_length() - 1)
  interleaved = _geometric(2 * power)[0::2][: num_heads - power]
  return np.concatenate([_geometric(power), interleaved])


def _geometric(power: int) -> NDArray[np.float64]:
  """The slopes 2^(-8/n), 2^(-16/n), .. 2^-8 of a power of two of n heads, [n] float64."""
  return np.exp2(-8.0 * np.arange(1, power + 1) / power)


@overload
def log_decay(layer_index: int, num_layers: int, num_heads: int, offset: int) -> NDArray[np.float32]: ...
@overload
def log_decay(layer_index: jax.Array, num_layers: int, num_heads: int, offset: int) -> jax.Array: ...
def log_decay(
  layer_index: int | jax.Array, num_layers: int, num_heads: int, offset: int
) -> NDArray[np.float32] | jax.Array:
  """Log decay per token of each head of one layer: `-slope_h * (1 - (layer_index - offset) / (num_layers - 1) + 1e-5)`.

  Args:
    layer_index: 0-based index of the layer in the decoder, without MTP layers: a Python int, or a scalar integer array,
      which may be traced (in a scan over layers). Both give the same float32 values.
    num_layers: number of decoder layers L, at least 2.
    num_heads: number of heads H.
    offset: 0 as in Megatron and SGLang (the models were trained with it), 1 as in the Hugging Face code.

  Returns:
    `g_gamma` for `gla`: [H] float32, natural log of the decay per token, negative. A numpy array for an int
    layer_index, a jax array for an array. An array index past the last layer gives NaN, as it cannot raise.

  Raises:
    ValueError: num_layers is below 2, offset is neither 0 nor 1, or an int layer_index is not in [0, num_layers).
  """
  if num_layers < 2:
    raise ValueError(f"log_decay: num_layers is {num_layers}, expected at least 2, because it divides by num_layers - 1.")
  if offset not in (0, 1):
    raise ValueError(f"log_decay: offset is {offset!r}, expected 0 (Megatron) or 1 (Hugging Face).")
  table = _table(num_layers, num_heads, offset)
  if isinstance(layer_index, jax.Array):
    return jnp.asarray(table).at[layer_index].get(mode="fill", fill_value=jnp.nan)
  if not 0 <= layer_index < num_layers:
    raise ValueError(f"log_decay: layer_index is {layer_index}, expected 0 to {num_layers - 1} for {num_layers} layers.")
  g_gamma: NDArray[np.float32] = table[layer_index].copy()  # the table is cached
  return g_gamma


@functools.cache
def _table(num_layers: int, num_heads: int, offset: int) -> NDArray[np.float32]:
  """The log decays of all layers, [L, H] float32, rounded once from float64."""
  depth = (np.arange(num_layers) - offset) / (num_layers - 1)
  return (-np.outer(1.0 - depth + _SLOPE_FLOOR, slopes(num_heads))).astype(np.float32)
