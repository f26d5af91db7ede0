"""Steps of a tiny model whose experts are spread over devices, under two routings; for `mesh_runs.py`.

"drawn": as random weights have it. "crowded": the biases send all tokens to the first experts, more than their device's
buffer holds.
"""

import re

import jax
import numpy as np
from flax import nnx
from maxtext.kernels.ragged import ragged_gather_reduce, ragged_gather_reduce_v2

from maxtext_ling2.maxtext_api import session
from maxtext_ling2.model.layer_layout import layer_names
from maxtext_ling2.training import step
from mesh_runs import ROWS
from tiny import Run, batch


def steps(trains, settings):
  """Metrics of an eval step for both routings, and with `trains` those of a train step too.

  With sgd and learning rate 1, what a train step moved is the gradient of each parameter, and the update of each bias.
  "gathered" has the last axis of whatever the eval step all-gathers.
  """
  _round_as_the_kernel()
  _keep_counts()
  run = Run(**settings)
  data = batch(run.config, rows=ROWS * run.config.gradient_accumulation_steps)
  drawn, result = run.state, {"gathered": _gathered(run, data), "tokens": np.sum(data["inputs_segmentation"] > 0)}
  for routing, state in {"drawn": drawn, "crowded": _crowded(drawn, run.config.num_experts_per_tok)}.items():
    run.state = state
    found = run.evaluate(data)
    if trains:
      before = run.weights()
      found |= run.step(data)
      found |= {f"moved/{'.'.join(path)}": before[path] - value for path, value in run.weights().items()}
    result |= {f"{routing}/{name}": value for name, value in found.items()}
  return result


def _round_as_the_kernel():
  """Lets MaxText's reference of `ragged_gather_reduce`, all there is on CPUs, return the dtype of its input.

  So does the TPU kernel, and the reference of the kernel's first version; the second's returns bfloat16 always.
  """
  ragged_gather_reduce_v2._fallback_implementation = ragged_gather_reduce._fallback_implementation


def _keep_counts():
  """Adds each router's `expert_counts` [E] to the metrics of a train step."""
  original = step._router_metrics

  def with_counts(state, routers, config):
    counts = {}
    for router in routers:
      rows = router.counts.reshape(-1, config.num_experts)
      counts |= {f"counts/{name}": row for name, row in zip(layer_names(router.path, config), rows, strict=True)}
    return original(state, routers, config) | counts

  step._router_metrics = with_counts


def _crowded(state, top_k):
  """The state with biases so large that no score, between 0 and 1, and no other bias (tiny.weights) makes up for them."""

  def moved(path, variable):
    if path[-2:] != ("gate", "bias"):
      return variable
    bias = variable.get_value()
    return variable.replace(jax.device_put(bias.at[..., :top_k].set(8.0), bias.sharding))

  return nnx.from_flat_state([(path, moved(path, variable)) for path, variable in nnx.to_flat_state(state)])


def _gathered(run, data):
  with session.model_context(run.config, run.mesh):
    text = run._evaluate.lower(run.state, dict(data)).as_text()
  shapes = re.findall(r"stablehlo\.all_gather\".*?-> tensor<([\dx]+)x[a-z]", text, re.DOTALL)
  return np.unique([int(shape.split("x")[-1]) for shape in shapes]).astype(int)
