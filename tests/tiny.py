"""Tiny LING2 models with given weights, and MaxText's own train step on them; for the tests of model and training."""

import functools
import zlib

import numpy as np

from maxtext_ling2.checkpoint import blocks, mapping, stacking
from maxtext_ling2.maxtext_api import session

TINY = {
  "model_name": "ling2-tiny",
  "base_emb_dim": 32,
  "base_num_decoder_layers": 9,
  "inhomogeneous_layer_cycle_interval": 3,
  "base_num_query_heads": 4,
  "base_num_kv_heads": 4,
  "head_dim": 8,
  "base_mlp_dim": 48,
  "base_moe_mlp_dim": 16,
  "moe_shared_expert_dim": 24,
  "num_experts": 8,
  "num_experts_per_tok": 2,
  "n_routing_groups": 4,
  "topk_routing_group": 2,
  "q_lora_rank": 16,
  "kv_lora_rank": 16,
  "qk_nope_head_dim": 8,
  "qk_rope_head_dim": 4,
  "v_head_dim": 8,
  "vocab_size": 64,
  "max_target_length": 24,
  "per_device_batch_size": 4,
  "learning_rate": 1e-2,
  "learning_rate_schedule_steps": 100,
  "steps": 100,
  "warmup_steps_fraction": 0.0,
  **session.FLOAT32_SETTINGS,
}


def config(**settings):
  return session.make_config(**{**TINY, **settings})


def weights(cfg, scale=0.3):
  """Random weights by Hugging Face entry, the same in every layout: {path in the unscanned model: array}."""

  def one(entry):
    rng = np.random.default_rng(zlib.crc32("/".join(entry.path).encode()))
    value = rng.standard_normal(entry.shape) * scale
    if entry.path[-1] == "scale":
      value = 1.0 + value
    return value.astype(np.float32)

  return stacked(cfg, {entry: one(entry) for entry in mapping.entries(cfg)})


def stacked(cfg, values):
  """{entry of the mapping: array} as arrays by path in the model, in the layout of its config."""
  tensors = {}
  for entry, value in values.items():
    parts = value if len(entry.names) > 1 else [value]
    tensors |= {name: entry.to_hf(part) for name, part in zip(entry.names, parts, strict=True)}
  return {leaf.path: blocks.stack(leaf, tensors.__getitem__) for leaf in stacking.leaves(cfg)}


def model(cfg, values=None):
  """(model, mesh)"""
  mesh = session.make_mesh(cfg)
  return session.make_model(cfg, mesh, weights(cfg) if values is None else values), mesh


def batch(cfg, seed=0, packed=True, rows=None):
  """A global batch as MaxText's pipelines make it: two documents and some padding in each row."""
  rng = np.random.default_rng(seed)
  shape = (cfg.global_batch_size_to_load if rows is None else rows, cfg.max_target_length)
  tokens = rng.integers(1, cfg.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
  segments = np.ones(shape, np.int32)
  if packed:
    for row in segments:
      first, second = np.sort(rng.choice(np.arange(3, shape[1]), 2, replace=False))
      row[first:] = 2
      row[second:] = 0
  ends = np.concatenate([segments[:, 1:] != segments[:, :-1], np.ones_like(segments[:, :1], bool)], axis=1)
  starts = np.concatenate([np.ones_like(ends[:, :1]), ends[:, :-1]], axis=1)
  index = np.broadcast_to(np.arange(shape[1]), shape)
  positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
  targets_segments = np.where(ends & packed, 0, segments)
  return {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "inputs_position": positions.astype(np.int32),
    "targets_position": positions.astype(np.int32),
    "inputs_segmentation": segments,
    "targets_segmentation": targets_segments,
  }


class Run:
  """A training run: MaxText's train step as its trainer would jit it, on a tiny model with given weights."""

  def __init__(self, values=None, **settings):
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.common import train_state_nnx
    from maxtext.layers import quantizations
    from maxtext.trainers.pre_train import train
    from maxtext.utils import maxtext_utils, sharding, train_utils

    self.config = config(**settings)
    network, self.mesh = model(self.config, values)
    with session.model_context(self.config, self.mesh):
      network = quantizations.maybe_quantize_model(network, self.config)  # as MaxText does when it creates a model
      _, optimizer = train_utils.create_training_optimizer(self.config, network, mesh=self.mesh)
      state = train_state_nnx.TrainStateNNX(network, nnx.Optimizer(network, optimizer, wrt=nnx.Param))
    replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
    self.graph, state = nnx.split(state)
    with logical_axis_rules(self.config.logical_axis_rules):
      placed = sharding.nnx_construct_named_sharding(state, self.mesh)  # as its trainer does
    self.state = jax.device_put(state, placed)
    shardings = jax.tree.map(lambda _: replicated, nnx.state(network, nnx.Param))
    step, *_ = maxtext_utils.get_functional_train_with_signature(
      train.train_step, None, None, self.graph, self.config, shardings
    )
    evaluate, *_ = maxtext_utils.get_functional_eval_with_signature(train.eval_step, None, None, self.graph, self.config)
    self.step_function, self._step = step, jax.jit(step, out_shardings=(placed, None))
    self.evaluate_function, self._evaluate = evaluate, jax.jit(evaluate)

  def context(self):
    """In which MaxText traces the steps."""
    return session.model_context(self.config, self.mesh)

  def step(self, data):
    """One optimizer step; returns the scalar metrics."""
    with self.context():
      self.state, metrics = self._step(self.state, dict(data))
    return {name: np.asarray(value) for name, value in metrics["scalar"].items()}

  def evaluate(self, data):
    with self.context():
      metrics = self._evaluate(self.state, dict(data))
    return {name: np.asarray(value) for name, value in metrics["scalar"].items()}

  def forward(self, data):
    """Logits [B, T, V], traced again, with what a test has replaced in the model; waits for its callbacks."""
    import jax
    from flax import nnx

    names = ("inputs", "inputs_position", "inputs_segmentation")
    targets = {"decoder_target_tokens": data["targets"], "decoder_target_mask": data["targets_segmentation"]}

    def run(state):
      network = nnx.merge(self.graph, state, copy=True).model
      return network(*(data[name] for name in names), enable_dropout=False, **targets)

    with self.context():
      logits = jax.jit(run)(self.state)
    jax.effects_barrier()
    return np.asarray(logits)

  def weights(self):
    """Current weights by per-layer path, the same in every layout."""
    return per_layer(self.config, self.flat("model"))

  def flat(self, root):
    from flax import nnx

    return {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(self.state[root]) if _plain(v)}


def per_layer(cfg, flat):
  """Arrays by path in the model as arrays by path in the unscanned model."""
  present = [leaf for leaf in stacking.leaves(cfg) if leaf.path in flat]
  tensors = {name: tensor for leaf in present for name, tensor in blocks.unstack(leaf, flat[leaf.path])}
  entries = (entry for leaf in present for cycle in leaf.entries for entry in cycle)
  parts = {entry: [entry.from_hf(tensors[name]) for name in entry.names] for entry in entries}
  return {entry.path: np.stack(found) if len(found) > 1 else found[0] for entry, found in parts.items()}


def _plain(variable):
  from flax import nnx

  return not isinstance(variable, nnx.RngState)


@functools.cache
def cached_run(**settings):
  return Run(**settings)
