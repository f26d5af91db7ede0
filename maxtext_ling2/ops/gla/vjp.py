"""The gradient of GLA, for every implementation that works in chunks: q, k and v are kept, and a state for each chunk.

Notable: the implementation is chosen inside of the gradient rule, not around it. So a choice by platform keeps what one
implementation keeps, instead of what all of them would.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp


class Forward(Protocol):
  """The forward pass. Operands have one dtype, float32 or bfloat16.

  It returns o [B, T, H, Dv], the state after the last token [B, H, D, Dv] float32 (None unless `final`), and the states
  that enter the chunks [B, H, N, D, Dv] in the dtype of the operands (None unless `save`).
  """

  def __call__(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g_gamma: jax.Array,
    segment_ids: jax.Array | None,
    initial_state: jax.Array | None,
    *,
    scale: float,
    final: bool,
    save: bool,
  ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]: ...


class Backward(Protocol):
  """The backward pass: dq, dk, dv in the dtype of the operands, and the gradient of the initial state, float32.

  `states` are those of the forward pass; the last is None unless `initial`.
  """

  def __call__(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g_gamma: jax.Array,
    segment_ids: jax.Array | None,
    states: jax.Array,
    do: jax.Array,
    dfinal_state: jax.Array | None,
    *,
    scale: float,
    initial: bool,
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]: ...


@dataclasses.dataclass(frozen=True)
class Implementation:
  """A backend of GLA that works in chunks of `tiles.chunk_size` tokens."""

  forward: Forward
  backward: Backward

  def __call__(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g_gamma: jax.Array,
    *,
    segment_ids: jax.Array | None,
    initial_state: jax.Array | None,
    scale: float,
    final: bool,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Arguments and results as in `api.Backend`."""
    dtype = jnp.result_type(q, k, v)
    call = _Call(self, scale, final, initial_state is not None)
    o, final_state = _run(call, *(x.astype(dtype) for x in (q, k, v)), g_gamma, segment_ids, initial_state)
    return o.astype(v.dtype), final_state


@dataclasses.dataclass(frozen=True)
class _Call:
  """What is known when a call is traced."""

  implementation: Implementation
  scale: float
  final: bool  # whether the final state is wanted
  initial: bool  # whether there is an initial state


_Results = tuple[jax.Array, jax.Array | None]
_Kept = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
  call: _Call,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array,
  segment_ids: jax.Array | None,
  initial_state: jax.Array | None,
) -> _Results:
  forward = call.implementation.forward
  return forward(q, k, v, g_gamma, segment_ids, initial_state, scale=call.scale, final=call.final, save=False)[:2]


def _run_and_keep(
  call: _Call,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array,
  segment_ids: jax.Array | None,
  initial_state: jax.Array | None,
) -> tuple[_Results, _Kept]:
  o, final_state, states = call.implementation.forward(
    q, k, v, g_gamma, segment_ids, initial_state, scale=call.scale, final=call.final, save=True
  )
  assert states is not None
  return (o, final_state), (q, k, v, g_gamma, segment_ids, states)


def _pull_back(call: _Call, kept: _Kept, cotangents: _Results) -> tuple[jax.Array | None, ...]:
  do, dfinal_state = cotangents
  dq, dk, dv, dinitial_state = call.implementation.backward(
    *kept, do, dfinal_state, scale=call.scale, initial=call.initial
  )
  return dq, dk, dv, None, None, dinitial_state  # g_gamma is a constant, segment ids are integers


_run.defvjp(_run_and_keep, _pull_back)
