"""The gradient rule of GLA for every chunked implementation: it saves q, k, v and one state per chunk.

Notable: the implementation is chosen inside the gradient rule, not around it. So a choice by platform saves the residuals
of the implementation that runs, not those of all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla.base import Backward, Forward, GlaInputs


@dataclasses.dataclass(frozen=True)
class Implementation:
  """A `Backend` that works in chunks of `block_sizes.chunk_size` tokens."""

  forward: Forward
  backward: Backward

  def __call__(self, inputs: GlaInputs, *, scale: float, output_final_state: bool) -> tuple[jax.Array, jax.Array | None]:
    dtype = jnp.result_type(*inputs[:3])
    q, k, v = (x.astype(dtype) for x in inputs[:3])
    call = _Call(self, scale, output_final_state, inputs.initial_state is not None)
    o, final_state = _run(call, inputs._replace(q=q, k=k, v=v))
    return o.astype(inputs.v.dtype), final_state


@dataclasses.dataclass(frozen=True)
class _Call:
  """What is known when a call is traced."""

  implementation: Implementation
  scale: float
  output_final_state: bool
  has_initial_state: bool


_Results = tuple[jax.Array, jax.Array | None]  # o, final_state
_Residuals = tuple[GlaInputs, jax.Array]  # inputs without initial_state, chunk_states [B, H, N, D, Dv]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(call: _Call, inputs: GlaInputs) -> _Results:
  forward = call.implementation.forward
  return forward(inputs, scale=call.scale, output_final_state=call.output_final_state, save_residuals=False)[:2]


def _fwd(call: _Call, inputs: GlaInputs) -> tuple[_Results, _Residuals]:
  o, final_state, chunk_states = call.implementation.forward(
    inputs, scale=call.scale, output_final_state=call.output_final_state, save_residuals=True
  )
  assert chunk_states is not None
  return (o, final_state), (inputs._replace(initial_state=None), chunk_states)


def _bwd(call: _Call, residuals: _Residuals, cotangents: _Results) -> tuple[GlaInputs]:
  dq, dk, dv, dinitial_state = call.implementation.backward(
    *residuals, *cotangents, scale=call.scale, has_initial_state=call.has_initial_state
  )
  # g_gamma is a constant and segment_ids are integers: no cotangents.
  return (GlaInputs(dq, dk, dv, None, None, dinitial_state),)  # type: ignore[arg-type]


_run.defvjp(_fwd, _bwd)
