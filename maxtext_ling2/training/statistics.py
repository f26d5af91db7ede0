"""Counts of the routers of a model during a training step.

The variables exist only inside the step: they are attached to the routers before MaxText's step function runs and removed
from its result, so checkpoints, evaluation and decoding do not have them. MaxText carries them through scan,
rematerialisation and gradient accumulation like any state that is not a parameter, which makes them sums over all
microbatches of the global batch.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext_ling2.model.moe import Router
from maxtext_ling2.training import qk_clip

COUNTS = "expert_counts"
Z_LOSS = "z_loss"
SCORES = "score_sums"
Path = tuple[Any, ...]


class RouterStatistic(nnx.Variable[jax.Array]):
  """A router's sum over the microbatches of a step."""


@dataclasses.dataclass(frozen=True)
class RouterStatistics:
  """The sums of one router, or of a stack of routers in a layer scan.

  Attributes:
    path: of the router in the train state.
    counts: tokens of the global batch sent to each expert, [..., E] int32.
    z_loss: sum of the z-loss before its weight, see `model/moe.Router`, [...] float32; None at weight 0.
    scores: sums over tokens of `model/moe.RoutedMoE.score_sums`, [..., 2] float32; None without
      record_internal_nn_metrics.
  """

  path: Path
  counts: jax.Array
  z_loss: jax.Array | None
  scores: jax.Array | None


def attach(graph: Any, state: Any, config: Any) -> tuple[Any, Any]:
  """Attaches sums, 0, to every router of a train state, and with QK-clip maxima to every MLA layer.

  Args:
    graph: graph definition of MaxText's train state.
    state: its state.
    config: MaxText config.

  Returns:
    (graph definition, state) of the same train state with the sums.
  """
  train_state = nnx.merge(graph, state)
  if config.use_qk_clip:
    qk_clip.attach(train_state.model, config)
  for _, node in nnx.iter_graph(train_state.model):
    if isinstance(node, Router):
      stack = _stack(node.kernel.get_value().shape, config.param_scan_axis)
      setattr(node, COUNTS, RouterStatistic(jnp.zeros((*stack, config.num_experts), jnp.int32)))
      if config.moe_z_loss_weight > 0.0:
        setattr(node, Z_LOSS, RouterStatistic(jnp.zeros(stack, jnp.float32)))
      if config.record_internal_nn_metrics:
        setattr(node, SCORES, RouterStatistic(jnp.zeros((*stack, 2), jnp.float32)))
  return nnx.split(train_state)


def detach(state: Any) -> tuple[Any, list[RouterStatistics]]:
  """Removes the sums from a train state that a step returned; returns (state, sums of each router)."""
  flat = dict(nnx.to_flat_state(state))
  sums = {path: flat.pop(path).get_value() for path in list(flat) if isinstance(flat[path], RouterStatistic)}
  routers = sorted((path[:-1] for path in sums if path[-1] == COUNTS), key=str)
  statistics = [
    RouterStatistics(path, sums[(*path, COUNTS)], sums.get((*path, Z_LOSS)), sums.get((*path, SCORES)))
    for path in routers
  ]
  return nnx.from_flat_state(list(flat.items())), statistics


def _stack(kernel_shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
  """The sizes of the stacked axes of a router kernel [C, E], which a layer scan inserts at `axis`."""
  stacked = len(kernel_shape) - 2
  return kernel_shape[axis : axis + stacked]


def collect(intermediates: Any, name: str) -> list[jax.Array]:
  """The arrays sown under `name` anywhere in MaxText's intermediate outputs."""
  return list(_leaves(intermediates, name))


def _leaves(tree: Any, name: str) -> Iterator[jax.Array]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if any(getattr(key, "key", None) == name for key in path):
      yield leaf
