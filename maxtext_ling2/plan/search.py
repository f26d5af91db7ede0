"""What `plan --search` tries: meshes and batches, ranked by arithmetic before one of them is compiled."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from maxtext_ling2.maxtext_api import overrides
from maxtext_ling2.maxtext_api.start import ConfigError
from maxtext_ling2.plan.chips import Chip, Slice, slice_of, slices_of
from maxtext_ling2.plan.floor import Floor, Shares, floors, routed_rows
from maxtext_ling2.plan.resolved import planned_config

MESHES = ("", "expert=4", "expert=8", "expert=16", "tensor=4")
"""Meshes that are ranked; what is left of the devices is FSDP's."""
RING_OF_EXPERTS = {
  "use_ring_of_experts": True,
  "use_ragged_sort": True,
  "ragged_buffer_factor": 1.5,
  "moe_dropless_fallback": "layer",
  "moe_topk_before_ep_all_gather": True,
  "ragged_gather_reduce_fallback": True,
}
"""Goes with expert parallelism: tokens travel around a ring, in buffers of one and a half times their even share, and a
layer whose tokens do not fit falls back to buffers that lose none. MaxText's SparseCore kernel for the sum over a token's
experts does not compile for every chip and batch (configs/recipes)."""
BATCH = "per_device_batch_size"
ROWS = ("1", "2", "4", "8")
"""Rows per device that are ranked, unless the user gives them."""
COMPILED = 2
"""How many that fit are compiled in the end."""
TRIES = 6
"""How many are compiled at most: the arithmetic of the memory is rough."""


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A mesh and a batch that has not been compiled.

  Attributes:
    mesh: such as expert=8.
    rows: per_device_batch_size, as text.
    seconds: per step: each part's floor, one after the other, and what is sent at the rate of a device at the edge.
    memory: bytes of HBM, a rough sum of the largest arrays.
    device_seconds_per_token: what candidates are ranked by.
  """

  mesh: str
  rows: str
  seconds: float
  memory: float
  device_seconds_per_token: float

  @property
  def name(self) -> str:
    """For a report."""
    return f"{self.mesh or 'fsdp'}, {self.rows} rows"


def settings_of(mesh: str) -> dict[str, str]:
  """Further settings that a mesh is ranked and compiled with."""
  return overrides.texts(RING_OF_EXPERTS) if "expert" in mesh else {}


def ranked(
  yml: str,
  topology: str,
  meshes: Mapping[str, Mapping[str, str]],
  settings: Mapping[str, str],
  rows: Sequence[str],
  named: str | None = None,
  figures: Mapping[str, Any] | None = None,
) -> list[Candidate]:
  """Candidates whose arrays fit the chip, the fastest per token first.

  Args:
    yml: base yml.
    topology: as MaxText's compile_topology.
    meshes: MaxText's settings of each mesh, by its text.
    settings: further settings, as text, which win.
    rows: per_device_batch_size of the candidates.
    named: as for `planned_config`.
    figures: as for `slice_of`.

  Raises:
    TopologyError: the topology is not known.
    ConfigError: MaxText refuses all candidates.
    ModelError: the settings describe another model.
  """
  place = slice_of(topology, figures)
  devices = place.devices * slices_of(settings)
  found, refused = [], None
  for mesh, cut in meshes.items():
    for batch in rows:
      words = {**cut, **settings, BATCH: batch}
      try:
        config = planned_config(yml, topology, words, named)
      except ConfigError as error:  # such as experts that this mesh cannot divide
        refused = error
        continue
      found.append(candidate(mesh, batch, config, place, devices))
  if not found and refused is not None:
    raise refused
  return sorted((one for one in found if one.memory < place.chip.memory), key=lambda one: one.device_seconds_per_token)


def candidate(mesh: str, rows: str, config: Any, place: Slice, devices: int) -> Candidate:
  """The arithmetic of one config, on so many devices of one or more slices."""
  shares = Shares.of(config, devices, devices // place.devices)
  seconds = sum(_seconds(one, place.chip, place.edge_bandwidth) for one in floors(config, shares).values())
  tokens = config.global_batch_size_to_train_on * config.max_target_length
  return Candidate(mesh, rows, seconds, memory(config, shares), devices * seconds / tokens)


def _seconds(floor: Floor, chip: Chip, edge_bandwidth: float) -> float:
  links = edge_bandwidth or chip.ici_bandwidth  # 0: both devices are on one chip
  return max(floor.flops / chip.flops, floor.memory / chip.memory_bandwidth) + floor.network_bytes / links


def memory(config: Any, shares: Shares) -> float:
  """Bytes of the largest arrays: weights and AdamW's moments, a layer's gathered experts and their gradients, the logits
  of one loss as they are computed, the input of each layer, and two layers' worth of sorted rows. A policy of
  rematerialisation other than "full" saves more, which is not calculated.
  """
  c = config
  routed = routed_rows(c, shares)
  tokens = routed / c.num_experts_per_tok
  expert_weights = 3 * c.emb_dim * c.moe_mlp_dim * c.num_experts
  layers = c.num_decoder_layers + c.mtp_num_layers
  state = _state_bytes(c) * (layers * expert_weights + 2 * c.emb_dim * c.vocab_size) / shares.shards
  gathered = 4 * expert_weights * 2 / (shares.expert * shares.tensor)
  pieces = 1 if c.mtp_num_layers else max(c.num_vocab_tiling, 1)  # MTP's are not computed in pieces
  logits = _logit_bytes(c) * tokens * c.vocab_size / pieces / shares.tensor
  rows = 4 * routed * (2 * c.emb_dim + 3 * c.moe_mlp_dim) * max(c.ragged_buffer_factor, 1.0)
  inputs = 0 if c.decoder_layer_input == "offload" else 2 * tokens * c.emb_dim * layers
  return float(state + gathered + logits + inputs + rows)


def _logit_bytes(config: Any) -> int:
  """Bytes per logit that are written: XLA fuses the cast to float32 and the gradient with what reads them."""
  return 4 if config.logits_dot_in_fp32 else jnp.dtype(config.dtype).itemsize


def _state_bytes(config: Any) -> int:
  """Bytes per weight that a device holds between steps: the weight, and the moments of AdamW, of which the second has its
  dtype; those that are kept in the host's memory do not count.
  """
  weight = jnp.dtype(config.weight_dtype).itemsize
  moments = jnp.dtype(config.mu_dtype or config.weight_dtype).itemsize + weight
  return weight * (not config.parameter_memory_host_offload) + moments * (not config.optimizer_memory_host_offload)
