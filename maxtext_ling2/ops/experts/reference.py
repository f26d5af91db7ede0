"""Reference implementation: every expert applied to every token, in float32 (float64 for float64 arrays)."""

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.experts.base import ExpertsInputs


def reference(inputs: ExpertsInputs) -> jax.Array:
  """`api.experts` without any rounding before the end."""
  dtype = jnp.promote_types(inputs.x.dtype, jnp.float32)
  x, weights, w_gate, w_up, w_down = (
    a.astype(dtype) for a in (inputs.x, inputs.weights, inputs.w_gate, inputs.w_up, inputs.w_down)
  )
  with jax.default_matmul_precision("highest"):
    h = jax.nn.silu(jnp.einsum("nc,ecf->enf", x, w_gate)) * jnp.einsum("nc,ecf->enf", x, w_up)  # [E, N, F]
    y = jnp.einsum("enf,efc->enc", h, w_down)  # [E, N, C]
    chosen = inputs.indices[..., None] == jnp.arange(w_gate.shape[0])  # [N, k, E]; no column for experts elsewhere
    of_expert = jnp.sum(jnp.where(chosen, weights[..., None], 0), axis=1)  # [N, E]
    return jnp.einsum("ne,enc->nc", of_expert, y).astype(inputs.x.dtype)
