"""What each part of a LING2 train step must compute, move and send at least: arithmetic from the config's shapes.

Per device and step; C hidden, T tokens of a device, weights in the compute dtype (bfloat16: 2 bytes), p forward passes (2
where the policy is to rematerialise everything), P a part's weights, a = 2 C bytes per token. What is left out is what
perfect fusion saves. Where the compiler keeps arrays in the chip's memory, or fetches weights under the name of a copy, a
part may count less than its floor.

  products     2 P T (p + 2) operations; weights read p + 1 times and their gradient written; the shard cast p times, 6
               bytes per weight. The down product of an MLP or an expert is not among those that are rematerialised: no
               gradient needs its result
  activations  of a layer's part: input and output in each forward pass, and in the backward pass input, its gradient and
               the output's: a T (2 p + 3)
  experts      of P a device has its share, computed are k experts per token; each token's rows read, and written and read
               by the weighted sum: a T (3 k + 1) in the forward pass, a T k where it is rematerialised, a T (4 k + 1) +
               8 k F T in the backward pass
  logits       never written, never recomputed: 3 a T; twice with MTP
  AdamW        32 bytes per weight of the shard: the norm reads gradients, the update four arrays and writes three
  collectives  weights gathered p times and written, gradients reduced; with experts on E devices tokens sent there p
               times and back once, and the gradients of both: C values E - 1 times in a ring of experts, else
               min(k (E - 1) / E, E - 1) times; with products divided among devices C values all-reduced twice per layer
               in each forward pass and in the backward pass (Shoeybi et al. 2019, Megatron-LM, section 3); devices that
               hold the same weights all-reduce their shard's gradient
"""

import dataclasses
import math
from typing import Any

from maxtext_ling2.model.layer_layout import is_dense, is_mla, shared_expert_width
from maxtext_ling2.plan.chips import Chip
from maxtext_ling2.plan.parts import COLLECTIVES
from maxtext_ling2.training import flops as model_flops


@dataclasses.dataclass(frozen=True)
class Floor:
  """Of one part, of one device and step: operations, bytes from and to the HBM, bytes sent."""

  flops: float = 0.0
  memory: float = 0.0
  network_bytes: float = 0.0

  def seconds(self, chip: Chip) -> float:
    """The longest of the three, at peak, full bandwidth, and the rate of all links."""
    return max(self.flops / chip.flops, self.memory / chip.memory_bandwidth, self.network_bytes / chip.ici_bandwidth)


@dataclasses.dataclass(frozen=True)
class Shares:
  """How a step is spread over devices.

  Attributes:
    devices: all of them.
    expert: among how many the experts are divided.
    tensor: among how many a product is divided.
    data: how many hold the same weights and moments.
  """

  devices: int
  expert: int = 1
  tensor: int = 1
  data: int = 1

  @property
  def shards(self) -> int:
    """Among how many devices all weights and moments are divided."""
    return self.devices // self.data

  @classmethod
  def of(cls, config: Any, devices: int, slices: int = 1) -> "Shares":
    """From MaxText's config, for so many devices of all slices together."""
    whole = {"ici": devices // slices, "dcn": slices}

    def along(*axes: str) -> int:
      return math.prod(_size(config, net, axis, whole[net]) for net in whole for axis in axes)

    tensor = along("tensor", "tensor_transpose", "tensor_sequence")
    return cls(devices, along("expert"), tensor, along("data", "diloco"))


def _size(config: Any, net: str, axis: str, whole: int) -> int:
  """Devices along an axis of the mesh; -1 is what the other axes leave."""
  size = getattr(config, f"{net}_{axis}_parallelism", 1)
  if size != -1:
    return int(size)
  return whole // math.prod(other for other in getattr(config, f"{net}_parallelism") if other != -1)


def routed_rows(config: Any, shares: Shares) -> float:
  """Rows that a device gives to its experts in a pass, all k of each token; as many are given to it on average."""
  tokens = config.global_batch_size_to_train_on / config.gradient_accumulation_steps * config.max_target_length
  return float(tokens * config.num_experts_per_tok * shares.tensor / shares.devices)


def floors(config: Any, shares: Shares) -> dict[str, Floor]:
  """The floor of each part that has one, by the names of `plan.parts`."""
  c, arithmetic = config, _Arithmetic(config, shares)
  layers = range(c.num_decoder_layers)
  mla = sum(is_mla(i, len(layers), c.inhomogeneous_layer_cycle_interval) for i in layers)
  dense = sum(is_dense(i, c.first_num_dense_layers) for i in layers)
  gla, mla, moe = len(layers) - mla, mla + c.mtp_num_layers, len(layers) - dense + c.mtp_num_layers
  shared = c.shared_experts * shared_expert_width(c)
  operation = model_flops.forward_flops(c)
  found = {
    "GLA": arithmetic.layers(gla, model_flops.gla_layer(c).weights / 2, operation.gla),
    "MLA": arithmetic.layers(mla, model_flops.mla_layer(c).weights / 2, operation.mla),
    "dense MLP": arithmetic.layers(dense, 3 * c.emb_dim * c.mlp_dim, again=2 / 3),
    "router": arithmetic.layers(moe, c.emb_dim * c.num_experts),
    "shared expert": arithmetic.layers(moe, 3 * c.emb_dim * shared, again=2 / 3),
    "experts": arithmetic.experts(moe),
    "MTP, besides": arithmetic.layers(c.mtp_num_layers, 2 * c.emb_dim**2),
    "logits and loss": arithmetic.logits(1 + c.mtp_num_layers),
    "norms, residuals": Floor(memory=2 * (len(layers) + c.mtp_num_layers) * arithmetic.in_and_out),
  }
  return found | arithmetic.update_and_collectives(moe)


class _Arithmetic:
  """The rules above, and the weights that were asked for so far."""

  def __init__(self, config: Any, shares: Shares):
    self.config, self.shares = config, shares
    self.width = 4 if str(getattr(config.dtype, "name", config.dtype)) == "float32" else 2
    self.passes = 2 if config.remat_policy == "full" else 1
    self.steps = config.gradient_accumulation_steps
    self.rows = routed_rows(config, shares) / config.num_experts_per_tok * self.steps  # tokens of a device
    self.token = config.emb_dim * self.width
    self.weights = float(config.emb_dim * config.vocab_size)  # of the whole model: the embedding, and all that follow
    self.touched = 0.0  # weights that a device multiplies with

  @property
  def in_and_out(self) -> float:
    """Bytes of a layer's part."""
    return self.rows * self.token * (2 * self.passes + 3) / self.shares.tensor

  def layers(self, count: int, weights: float, operation: float = 0.0, again: float = 1.0) -> Floor:
    """`count` layers with so many weights each, and further operations per token of all of them together.

    `again`: the share of the products that are rematerialised.
    """
    passes = 1 + (self.passes - 1) * again
    memory = self._products(count * weights, self.shares.tensor, passes) + count * self.in_and_out
    products = 2 * count * weights + operation
    return Floor(products * self.rows * (passes + 2) / self.shares.tensor, memory)

  def experts(self, count: int) -> Floor:
    c = self.config
    one = 3 * c.emb_dim * c.moe_mlp_dim
    k, inner = c.num_experts_per_tok, 4 * c.num_experts_per_tok * c.moe_mlp_dim * self.width
    passes = 1 + (self.passes - 1) * 2 / 3
    memory = self._products(count * one * c.num_experts, self.shares.tensor * self.shares.expert, passes)
    read = (3 * k + 1 + (self.passes - 1) * k + 4 * k + 1) * self.token + inner
    memory += count * self.rows * read / self.shares.tensor
    return Floor(2 * count * k * one * self.rows * (passes + 2) / self.shares.tensor, memory)

  def logits(self, count: int) -> Floor:
    weights = self.config.emb_dim * self.config.vocab_size
    memory = count * (self._products(weights, self.shares.tensor, 1) + 3 * self.rows * self.token / self.shares.tensor)
    return Floor(6 * count * weights * self.rows / self.shares.tensor, memory)

  def update_and_collectives(self, moe: int) -> dict[str, Floor]:
    """Once all weights are known: AdamW, and what is gathered, reduced and exchanged."""
    c, expert = self.config, self.shares.expert
    among, data = self.shares.shards / expert / self.shares.tensor, self.shares.data
    gathered = self.touched * self.width * self.steps * (self.passes if among > 1 else 0)
    reduced = self.touched * self.width * self.steps * (among > 1)
    ring = getattr(c, "use_ring_of_experts", False)
    copies = expert - 1 if ring else min(c.num_experts_per_tok * (expert - 1) / expert, expert - 1)
    exchanged = (self.passes + 3) * moe * copies * self.rows * self.token  # to the experts and back, and both gradients
    layers, tensor = c.num_decoder_layers + c.mtp_num_layers, self.shares.tensor
    summed = 2 * (self.passes + 1) * layers * 2 * (tensor - 1) / tensor * self.rows * self.token
    replicas = 2 * (data - 1) / data * self.touched * self.width / among  # once per step, whatever it accumulates
    network_bytes = (gathered + reduced) * (among - 1) / among + exchanged + summed + replicas
    update = 32 * self.weights / self.shares.shards
    return {
      "gradient norms, AdamW": Floor(memory=update),
      COLLECTIVES: Floor(memory=gathered + reduced, network_bytes=network_bytes),
    }

  def _products(self, weights: float, share: int, passes: float) -> float:
    """Bytes of all weights of a kind: read in each pass, their gradient written, the shard cast."""
    self.weights += weights
    self.touched += weights / share
    cast = passes * weights / self.shares.shards * (4 + self.width)
    return self.steps * (weights / share * self.width * (passes + 2) + cast)
