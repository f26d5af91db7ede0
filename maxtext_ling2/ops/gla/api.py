"""The entry to GLA: checks the arguments, fills in the defaults, and calls a backend."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import jax
import jax.numpy as jnp
import numpy as np

from maxtext_ling2.ops.backends import GLA_BACKENDS
from maxtext_ling2.ops.gla.base import Backend, GlaInputs
from maxtext_ling2.ops.gla.chunked import chunked
from maxtext_ling2.ops.gla.pallas_tpu import pallas
from maxtext_ling2.ops.gla.reference import reference
from maxtext_ling2.ops.gla.vjp import Implementation

_chunked = chunked()


def _by_platform[F: Callable[..., Any]](tpu: F, default: F) -> F:
  def call(*args: Any, **static: Any) -> Any:
    tpu_pass, default_pass = (functools.partial(x, **static) for x in (tpu, default))
    return jax.lax.platform_dependent(*args, tpu=tpu_pass, default=default_pass)

  return cast(F, call)


auto = Implementation(_by_platform(pallas.forward, _chunked.forward), _by_platform(pallas.backward, _chunked.backward))
"""TPU kernels where the program is compiled for a TPU, plain JAX elsewhere.

The platform is known only when a program is lowered: a program compiled ahead of time for a TPU is traced on a machine
whose own devices are CPUs. So both are traced, and only the one for the platform is lowered.
"""

_BACKENDS: Final[Mapping[str, Backend]] = dict(zip(GLA_BACKENDS, (auto, reference, _chunked, pallas), strict=True))
_OPERANDS: Final = (jnp.float32, jnp.bfloat16)


def gla(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array | np.ndarray,
  *,
  segment_ids: jax.Array | None = None,
  initial_state: jax.Array | None = None,
  output_final_state: bool = False,
  scale: float | None = None,
  backend: str = "auto",
) -> tuple[jax.Array, jax.Array | None]:
  """Gated linear attention with one constant decay per head, causal over the sequence.

  For each sequence and head h, over the tokens t, with a float32 state S [D, Dv]:

      S_t = exp(g_gamma[h]) * S_{t-1} + k_t v_t^T
      o_t = scale * q_t S_t

  Source: lightning attention (Qin et al. 2024, arXiv:2405.17381); "simple GLA" with a constant gate.

  Padding and documents: `segment_ids` gives the document of each token, and id 0 marks padding.
  - A padded token is skipped: it adds nothing, does not decay the state, and its output is 0. So with padding on the
    right the final state is the state after the last real token, and a row of padding only returns its initial state.
    The values of q, k and v at padding are never used: they may be NaN.
  - The state restarts at zero at each real token whose id differs from that of the last real token before it, however
    much padding lies between. If the ids are equal, the state continues across the padding. Ids need no order, and an
    id that comes back later (1, 2, 1) is a new document.
  - `initial_state` belongs to the document of the first real token. A caller that splits a sequence and passes the
    state on must therefore zero the state of the rows that are split at a document boundary.

  Args:
    q: queries [B, T, H, D], float32 or bfloat16, T at least 1.
    k: keys [B, T, H, D], float32 or bfloat16.
    v: values [B, T, H, Dv], float32 or bfloat16; Dv may differ from D.
    g_gamma: [H] float32, natural log of the decay per token, at most 0. A constant: it gets no gradient.
    segment_ids: [B, T] integer; None: each sequence is one document without padding.
    initial_state: [B, H, D, Dv] float32, or None for zeros.
    output_final_state: whether to return the state after the last token.
    scale: factor of the outputs (not of the state); None means D ** -0.5.
    backend: "reference" (the recurrence in float32, slow), "chunked" (plain JAX matmuls), "pallas" (a TPU kernel), or
      "auto": "pallas" where the program is compiled for a TPU, else "chunked". Both multiply in bfloat16 with float32
      sums if q, k and v are all bfloat16, else in full float32. The compiler cannot partition "pallas": call it under
      `jax.shard_map` over batch and heads.

  Returns:
    o [B, T, H, Dv] in v's dtype, and the final state [B, H, D, Dv] float32 (None without output_final_state). Both
    are differentiable in q, k, v and initial_state.

  Raises:
    ValueError: the backend is unknown, or an argument has a wrong shape or dtype.
  """
  run = _backend(backend)
  _check(q, k, v, g_gamma, segment_ids, initial_state)
  inputs = GlaInputs(q, k, v, jax.lax.stop_gradient(jnp.asarray(g_gamma)), segment_ids, initial_state)
  scale = q.shape[3] ** -0.5 if scale is None else scale
  return run(inputs, scale=scale, output_final_state=output_final_state)


def backends() -> tuple[str, ...]:
  """The names `gla` takes as `backend`."""
  return GLA_BACKENDS


def _backend(name: str) -> Backend:
  try:
    return _BACKENDS[name]
  except KeyError:
    choices = ", ".join(map(repr, backends()))
    raise ValueError(f"gla: backend is {name!r}, expected one of {choices}.") from None


def _check(q: Any, k: Any, v: Any, g_gamma: Any, segment_ids: Any, initial_state: Any) -> None:
  """Raises ValueError for the first argument that is wrong in itself or does not fit those before it."""
  for name, value in (("q", q), ("v", v)):
    if value.ndim != 4 or 0 in value.shape:
      raise ValueError(f"gla: {name} has shape {value.shape}, expected 4 dimensions [B, T, H, D], none of size 0.")
  batch, length, heads, key_dim = q.shape
  value_dim = v.shape[3]
  because = f"q is {q.shape} and v is {v.shape}"
  _check_one("q", q, q.shape, _OPERANDS, because)
  _check_one("k", k, q.shape, _OPERANDS, because)
  _check_one("v", v, (batch, length, heads, value_dim), _OPERANDS, because)
  _check_one("g_gamma", g_gamma, (heads,), (jnp.float32,), because)
  if segment_ids is not None:
    _check_one("segment_ids", segment_ids, (batch, length), (jnp.integer,), because)
  if initial_state is not None:
    _check_one("initial_state", initial_state, (batch, heads, key_dim, value_dim), (jnp.float32,), because)


def _check_one(
  name: str, value: jax.Array | np.ndarray, shape: tuple[int, ...], dtypes: tuple[Any, ...], because: str
) -> None:
  if value.shape != shape:
    raise ValueError(f"gla: {name} has shape {value.shape}, expected {shape}, because {because}.")
  if not any(jnp.issubdtype(value.dtype, dtype) for dtype in dtypes):
    choices = " or ".join(dtype.__name__ for dtype in dtypes)
    raise ValueError(f"gla: {name} has dtype {value.dtype}, expected {choices}.")
