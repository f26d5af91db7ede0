"""`ops.experts` in place of the grouped products of MaxText's RoutedMoE: when, and sharded over the mesh.

Each device computes its own sequences with all experts, or, in a ring of experts, the sequences of all devices of the
`expert` axis with its own experts. The rest is MaxText's: router, choice of experts, expert counts, token chunks, and the
fallback for a device that gets more tokens than `ragged_buffer_factor` provides for.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.layers import moe
from maxtext.utils import sharding

from maxtext_ling2.configs import experts as experts_config
from maxtext_ling2.ops.devices import is_gpu
from maxtext_ling2.ops.experts import experts
from maxtext_ling2.ops.experts.block_sizes import why_not_kernel
from maxtext_ling2.ops.experts.dispatch import ALIGNMENT

logger = logging.getLogger("maxtext_ling2")

_EXPERT = "expert"
"""The mesh axis of the experts. Custom rules that shard them over others take MaxText's path."""

_FSDP = ("fsdp",)

_ON_GPUS = (
  "On a GPU MaxText interprets their kernel (megablox=true), or XLA multiplies all rows with all experts "
  "(megablox=false); change that setting, or use sparse_matmul=false"
)


class Matrices(NamedTuple):
  """The experts' weights."""

  gate: Any  # [E, C, F]
  up: Any  # [E, C, F]
  down: Any  # [E, F, C]


class Specs(NamedTuple):
  """How the arrays of a layer lie on the mesh."""

  tokens: jax.P  # of [B, T, C]
  scores: jax.P  # of [B, T, E] and [B, T, k]
  matrices: Matrices


def computes(layer: Any, x: jax.Array, matrices: Matrices, kind: str) -> bool:
  """Whether `apply` computes this call; the log says once if MaxText's path does, and why. Arguments: `why_maxtext`'s.

  Raises:
    ValueError: MaxText's path would have to, but the settings name another backend.
  """
  reason, backend = why_maxtext(layer, x, matrices, kind), layer.config.experts_backend
  if reason is None:
    return True
  if backend not in ("auto", experts_config.MAXTEXT):
    advice = "use experts_backend=auto or change that"
    raise ValueError(f"experts_backend={backend!r}: it cannot be had with {reason}; {advice}")
  text = f"routed experts are computed by MaxText's grouped products: {reason}"
  if is_gpu(kind) and layer.config.sparse_matmul:
    _log_once(logging.WARNING, f"{text}. {_ON_GPUS}")
  else:
    _log_once(logging.INFO, text)
  return False


@functools.cache
def _log_once(level: int, text: str) -> None:
  logger.log(level, text)


def why_maxtext(layer: Any, x: jax.Array, matrices: Matrices, kind: str) -> str | None:
  """Why MaxText's own path computes this call; None: `apply` does.

  Args:
    layer: MaxText's RoutedMoE with this package's view of the config.
    x: [B, T, C].
    matrices: as the layer passes them, which may be quantised.
    kind: of the devices.
  """
  config, backend = layer.config, layer.config.experts_backend
  if layer.only_maxtext:
    return str(layer.only_maxtext)
  if not all(isinstance(w, jax.Array) for w in matrices) or layer.quant is not None:
    return "quantised weights"
  if unsupported := _unsupported_axes(layer, x):
    return f"an expert's matrices cut over the mesh axes {', '.join(unsupported)}"
  if layer.get_expert_parallelism_size() > 1 and (not config.use_ring_of_experts or x.shape[0] == 1):
    return "experts on several devices without a ring of experts"
  if _drops_tokens(layer, x):
    return (
      f"ragged_buffer_factor={layer.get_ragged_buffer_factor()}, which drops tokens, without moe_dropless_fallback=layer"
    )
  if backend != "auto" or is_gpu(kind):
    return None
  if not kind.startswith("TPU"):
    return f"a {kind} device"
  if rows_per_expert(layer, x) < ALIGNMENT:
    return f"fewer than {ALIGNMENT} tokens per expert, the rows of a tile"
  _, width, hidden = matrices.gate.shape
  return why_not_kernel(width, hidden, x.dtype.itemsize, kind)


def _unsupported_axes(layer: Any, x: jax.Array) -> list[str]:
  """Mesh axes of several devices over which the matrices are cut, but for the whole experts on `_EXPERT`."""
  axes = {axis for spec in _specs(layer, x).matrices for dim in spec for axis in sharding.mesh_axes_for_dim(dim)}
  return sorted(axis for axis in axes - {_EXPERT} if layer.mesh.shape[axis] > 1)


def _drops_tokens(layer: Any, x: jax.Array) -> bool:
  """True if a device may get more tokens than it has room for, and none but MaxText's path drops the surplus."""
  if layer.get_expert_parallelism_size() == 1 or layer.config.moe_dropless_fallback == "layer":
    return False
  return layer.get_dropless_fallback_num_chunks(x.shape[1], 1) is not None


def rows_per_expert(layer: Any, x: jax.Array) -> float:
  """Tokens per expert on a device that has all experts, on average."""
  devices = math.prod(layer.mesh.shape[axis] for axis in _batch_axes(_specs(layer, x).tokens))
  return float(math.prod(x.shape[:2]) * layer.config.num_experts_per_tok / devices / layer.num_experts)


def apply(
  layer: Any,
  x: jax.Array,
  scores: tuple[jax.Array, jax.Array],
  matrices: Matrices,
  forced: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
  """What `RoutedMoE.sparse_matmul` computes, by `ops.experts`.

  Args:
    layer: MaxText's RoutedMoE.
    x: [B, T, C].
    scores: of the router: biased, unbiased, [B, T, E] float32.
    matrices: the experts' weights, in x's dtype.
    forced: [B, T, k] int32 experts that are to be used, or None.

  Returns:
    y [B, T, C], 0 or None (as MaxText's load-balance loss), expert counts [E] int32 of the whole batch or None.
  """
  specs = _specs(layer, x)
  device = _Device(layer, x.shape[1], _batch_axes(specs.scores))
  chosen = None if forced is None else specs.scores

  @functools.partial(
    jax.shard_map,
    mesh=layer.mesh,
    in_specs=(specs.tokens, (specs.scores, specs.scores), specs.matrices, chosen),
    out_specs=(specs.tokens, jax.P(), jax.P()),
    check_vma=layer.config.check_vma,
  )
  def run(x: Any, scores: Any, matrices: Any, forced: Any) -> Any:
    return device.layer_output(x, scores, Matrices(*matrices), forced)

  placed = jax.tree.map(layer._maybe_shard_with_pspec, (x, scores), (specs.tokens, (specs.scores, specs.scores)))
  weights = Matrices(*map(layer._maybe_shard_with_pspec, matrices, specs.matrices))
  y, counts, fell_back = run(*placed, weights, forced)
  layer.sow(nnx.Intermediate, "moe_has_overflow", jnp.zeros((), jnp.bool_))
  if layer.config.moe_dropless_fallback == "layer":
    layer.sow(nnx.Intermediate, "moe_dropless_fallback", fell_back)
  loss = jnp.zeros((), jnp.float32) if layer.config.load_balance_loss_weight > 0.0 else None
  return y, loss, counts


class _Device:
  """One device's part of a layer, inside `shard_map`."""

  def __init__(self, layer: Any, length: int, batch_axes: tuple[str, ...]):
    config = layer.config
    self.layer = layer
    self.batch_axes = batch_axes
    self.devices = layer.get_expert_parallelism_size()  # that share the experts
    self.chunks = config.num_moe_token_chunks if config.use_ring_of_experts else 1
    self.fallback_chunks = None
    if self.devices > 1 and config.moe_dropless_fallback == "layer":
      self.fallback_chunks = layer.get_dropless_fallback_num_chunks(length, self.chunks)
    self.compute: Callable[..., jax.Array] = functools.partial(
      experts,
      activation_in_float32=config.activations_in_float32,
      backend=config.experts_backend,
    )

  def layer_output(self, x: Any, scores: Any, matrices: Matrices, forced: Any) -> tuple[Any, Any, Any]:
    """y [b, T, C], expert counts [E] or None, and whether the fallback was taken."""
    layer = self.layer
    weights, chosen = layer.get_topk(*scores, forced_routed_experts=forced)  # [b, T, k]
    counts = None
    if layer.should_update_load_balance():
      counts = moe.calculate_expert_counts(chosen, layer.num_experts, axis_names=self.batch_axes)
    if self.fallback_chunks is None:
      return self._in_chunks(self.chunks, None, False, x, weights, chosen, matrices), counts, jnp.bool_(False)
    overflows = layer._check_ragged_overflow(*scores, None, None, forced, self.chunks)
    rows = layer.get_ragged_buffer_size(
      chosen.size // self.chunks, self.devices, layer.num_experts, chosen.shape[-1], layer.get_ragged_buffer_factor()
    )
    usual = functools.partial(self._in_chunks, self.chunks, rows, False)
    # `lax.cond` keeps the residuals of both branches: the rare one has none.
    rare = jax.checkpoint(
      functools.partial(self._in_chunks, self.fallback_chunks, None, True),
      policy=jax.checkpoint_policies.nothing_saveable,
    )
    y = jax.lax.cond(overflows, rare, usual, x, weights, chosen, matrices)
    return y, counts, overflows

  def _in_chunks(
    self, number: int, rows: int | None, barrier: bool, x: Any, weights: Any, chosen: Any, matrices: Matrices
  ) -> jax.Array:
    """y [b, T, C], in equal chunks of the sequences, one after the other with a barrier."""
    barrier = barrier or self.layer.config.moe_chunk_barrier
    pieces: list[jax.Array] = []
    for tokens, scales, experts_of in zip(*(jnp.split(a, number, axis=1) for a in (x, weights, chosen)), strict=True):
      if barrier and pieces:
        tokens, pieces[-1] = jax.lax.optimization_barrier((tokens, pieces[-1]))
      pieces.append(self._chunk(rows, tokens, scales, experts_of, matrices))
    return jnp.concatenate(pieces, axis=1) if number > 1 else pieces[0]

  def _chunk(self, rows: int | None, x: Any, weights: Any, chosen: Any, matrices: Matrices) -> jax.Array:
    """y [b, t, C] of x [b, t, C], weights and chosen [b, t, k]."""
    if self.devices == 1:
      return self._local(None, x, weights, chosen, matrices)
    gather = functools.partial(jax.lax.all_gather, axis_name=_EXPERT, axis=0, tiled=True)
    x, weights, chosen = map(gather, (x, weights, chosen))  # [devices * b, t, ...]
    first = jax.lax.axis_index(_EXPERT) * matrices.gate.shape[0]
    y = self._local(rows, x, weights, chosen - first, matrices)
    return jax.lax.psum_scatter(y, _EXPERT, scatter_dimension=0, tiled=True)

  def _local(self, rows: int | None, x: Any, weights: Any, chosen: Any, matrices: Matrices) -> jax.Array:
    """What the device's own experts give for [b, t] tokens; `chosen` counts from the first of them."""
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, weights))
    return self.compute(*flat, *matrices, max_choices=rows).reshape(x.shape)


def _specs(layer: Any, x: jax.Array) -> Specs:
  """As MaxText's sparse_matmul has them; a batch that its axes do not divide lies on all devices."""
  tokens = layer._logical_to_mesh_axes(("activation_batch", "activation_norm_length", None))
  if layer.get_expert_parallelism_size() == 1:
    tokens = sharding.remove_incompatible_mesh_axes_from_partition_spec(
      tokens, x.shape, layer.mesh, dims=(0,), allow_remove_axes=True
    )
  wide = layer._logical_to_mesh_axes(("exp", None, "mlp_no_fsdp"))
  down = layer._logical_to_mesh_axes(("exp", "mlp_no_fsdp", None))
  matrices = (sharding.remove_mesh_axes_from_partition_spec(spec, _FSDP) for spec in (wide, wide, down))
  return Specs(tokens, tokens, Matrices(*matrices))


def _batch_axes(spec: jax.P) -> tuple[str, ...]:
  """Mesh axes over which batch and sequence are sharded."""
  axes = [axis for dim in spec[:2] for axis in sharding.mesh_axes_for_dim(dim)]
  return tuple(dict.fromkeys(axes))
