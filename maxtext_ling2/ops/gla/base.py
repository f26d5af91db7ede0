"""The arrays of a GLA call as one tuple, and what a backend and its forward and backward pass look like."""

from typing import NamedTuple, Protocol

import jax


class GlaInputs(NamedTuple):
  """The arrays of one call of `api.gla`, checked."""

  q: jax.Array  # [B, T, H, D]
  k: jax.Array  # [B, T, H, D]
  v: jax.Array  # [B, T, H, Dv]
  g_gamma: jax.Array  # [H] float32: log decay per token
  segment_ids: jax.Array | None  # [B, T] integer, 0 for padding
  initial_state: jax.Array | None  # [B, H, D, Dv] float32


class Outputs(NamedTuple):
  """The results of a forward pass."""

  o: jax.Array  # [B, T, H, Dv]
  final_state: jax.Array | None  # [B, H, D, Dv] float32, with output_final_state
  chunk_states: jax.Array | None  # [B, H, N, D, Dv] in q's dtype: h_in of each chunk, with save_residuals


class Gradients(NamedTuple):
  """The results of a backward pass; dq, dk and dv have the dtype of q, k and v."""

  dq: jax.Array  # [B, T, H, D]
  dk: jax.Array  # [B, T, H, D]
  dv: jax.Array  # [B, T, H, Dv]
  dinitial_state: jax.Array | None  # [B, H, D, Dv] float32, with has_initial_state


class Backend(Protocol):
  """An implementation of GLA: o in v's dtype, and the final state (None without output_final_state)."""

  def __call__(
    self, inputs: GlaInputs, *, scale: float, output_final_state: bool
  ) -> tuple[jax.Array, jax.Array | None]: ...


class Forward(Protocol):
  """The forward pass of a chunked implementation; q, k and v have one dtype, float32 or bfloat16."""

  def __call__(self, inputs: GlaInputs, *, scale: float, output_final_state: bool, save_residuals: bool) -> Outputs: ...


class Backward(Protocol):
  """The backward pass. `chunk_states` are those of the forward pass; `inputs.initial_state` is None, it is not needed."""

  def __call__(
    self,
    inputs: GlaInputs,
    chunk_states: jax.Array,
    do: jax.Array,
    dfinal_state: jax.Array | None,
    *,
    scale: float,
    has_initial_state: bool,
  ) -> Gradients: ...
