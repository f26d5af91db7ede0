"""The arrays of a call of `experts` as one tuple, and what a backend's forward and backward pass look like."""

from typing import NamedTuple, Protocol

import jax


class ExpertsInputs(NamedTuple):
  """The arrays of one call of `api.experts`, checked. They are also all that is saved for the backward pass."""

  x: jax.Array  # [N, C]
  indices: jax.Array  # [N, k] int32: local experts; others contribute nothing
  weights: jax.Array  # [N, k] float32
  w_gate: jax.Array  # [E, C, F]
  w_up: jax.Array  # [E, C, F]
  w_down: jax.Array  # [E, F, C]


class Gradients(NamedTuple):
  """The results of a backward pass, each of the shape and dtype of its input."""

  x: jax.Array
  weights: jax.Array
  w_gate: jax.Array
  w_up: jax.Array
  w_down: jax.Array


class Forward(Protocol):
  """y [N, C] in x's dtype."""

  def __call__(self, *inputs: jax.Array, activation_in_float32: bool, max_choices: int | None) -> jax.Array: ...


class Backward(Protocol):
  """The arrays of `ExpertsInputs` and dy [N, C] -> `Gradients`."""

  def __call__(self, *inputs: jax.Array, activation_in_float32: bool, max_choices: int | None) -> Gradients: ...
