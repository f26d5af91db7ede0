"""From tokens to rows in the order of the experts, and back: who is where, and gathers in both directions.

A choice is one (token, j-th expert) pair; its flat index is token * k + j. Rows are choices sorted by expert, in the
order of tokens within each. Each expert begins at a row that is a multiple of `alignment`, so that kernels copy whole
tiles; the rows between two experts are padding. Nothing is scattered: both directions are sorts and gathers.
"""

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

ABSENT: Final = -1
"""In place of a row: the choice is not one of the local experts. In place of a choice: the row is padding."""

ALIGNMENT: Final = 16
"""Rows of a bfloat16 tile in TPU memory."""


class Dispatch(NamedTuple):
  """Where each choice goes; R rows, the first of K >= R places in the order of the experts."""

  choice: jax.Array  # [R] int32: flat index of the choice in each row, or ABSENT
  row: jax.Array  # [N, k] int32: row of each choice, or ABSENT
  order: jax.Array  # [K] int32: as `choice`, with padding numbered from N * k on, so that it is a permutation
  inverse: jax.Array  # [K] int32: the inverse permutation, as `row`
  starts: jax.Array  # [E] int32: first row of each expert, a multiple of the alignment
  sizes: jax.Array  # [E] int32: choices of each expert


def num_rows(choices: int, experts: int, alignment: int) -> int:
  """R: enough rows for any distribution of the choices."""
  return round_up(choices + experts * (alignment - 1), alignment)


def round_up(x: int, multiple: int) -> int:
  """The next multiple."""
  return -(-x // multiple) * multiple


def dispatch(indices: jax.Array, experts: int, alignment: int = 1, max_choices: int | None = None) -> Dispatch:
  """Sorts choices by expert.

  Args:
    indices: [N, k] int32; entries outside 0 .. experts - 1 are not local.
    experts: number of local experts, E.
    alignment: of the first row of each expert.
    max_choices: how many choices are local at most; None: all may be. Rows of a surplus are missing.
  """
  expert = indices.reshape(-1)  # [N * k]
  local = (expert >= 0) & (expert < experts)
  expert = jnp.where(local, expert, experts)
  sizes = jnp.sum(expert[:, None] == jnp.arange(experts, dtype=expert.dtype), axis=0, dtype=jnp.int32)  # [E]
  aligned = -(-sizes // alignment) * alignment
  keys = num_rows(expert.size, experts, alignment)  # K
  rows = min(keys, num_rows(max_choices or expert.size, experts, alignment))  # R
  # Padding is sorted with the choices, so that one sort yields the rows.
  unsorted = jnp.concatenate([expert, _padding_keys(aligned - sizes, keys - expert.size, alignment)])  # [K]
  numbers = jax.lax.iota(jnp.int32, keys)
  sorted_keys, order = jax.lax.sort((unsorted, numbers), num_keys=1, is_stable=True)
  inverse = _permuted(numbers, order)
  choice = jnp.where((order < expert.size) & (sorted_keys < experts), order, ABSENT)[:rows]
  row = inverse[: expert.size]
  row = jnp.where(local & (row < rows), row, ABSENT).reshape(indices.shape)
  return Dispatch(choice, row, order, inverse, jnp.cumsum(aligned) - aligned, sizes)


def _permuted(values: jax.Array, to: jax.Array) -> jax.Array:
  """Values [K], each at the place `to` [K]. A sort: gathers and scatters of single numbers are slow on a TPU."""
  return jax.lax.sort((to, values), num_keys=1, is_stable=False)[1]


def _padding_keys(padding: jax.Array, number: int, alignment: int) -> jax.Array:
  """Sorting keys [number] of padding: each expert as often as it needs, the rest behind all experts."""
  experts = padding.size
  index = jnp.arange(alignment - 1, dtype=padding.dtype)
  own = jnp.arange(experts, dtype=padding.dtype)
  keys = jnp.where(index < padding[:, None], own[:, None], experts).reshape(-1)  # [E * (alignment - 1)]
  return jnp.pad(keys, (0, number - keys.size), constant_values=experts)


def gather_tokens(x: jax.Array, where: Dispatch) -> jax.Array:
  """x [N, C] of tokens as rows [R, C]; rows of padding hold some token."""
  k = where.row.shape[1]
  return x.at[jnp.maximum(where.choice, 0) // k].get(mode="promise_in_bounds")


def gather_weights(weights: jax.Array, where: Dispatch) -> jax.Array:
  """Routing weights [N, k] as rows [R]; 0 at padding."""
  padded = jnp.pad(weights.reshape(-1), (0, where.inverse.size - weights.size))  # [K]
  return jnp.where(where.choice == ABSENT, 0.0, _permuted(padded, where.inverse)[: where.choice.size])


def combine(rows: jax.Array, where: Dispatch) -> jax.Array:
  """Sum over the choices of each token of rows [R, C]: [N, C]. Summed in float32, rounded once."""
  present = where.row != ABSENT  # [N, k]
  chosen = rows.at[jnp.maximum(where.row, 0)].get(mode="promise_in_bounds")  # [N, k, C]
  return jnp.sum(jnp.where(present[..., None], chosen.astype(jnp.float32), 0.0), axis=1).astype(rows.dtype)


def choice_values(rows: jax.Array, where: Dispatch) -> jax.Array:
  """One value per row [R] as one per choice [N, k]; 0 for choices that are not local."""
  padded = jnp.pad(rows, (0, where.order.size - rows.size))  # [K]
  of_choice = _permuted(padded, where.order)[: where.row.size].reshape(where.row.shape)
  return jnp.where(where.row == ABSENT, 0.0, of_choice)
