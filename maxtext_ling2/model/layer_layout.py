"""Which layer is GLA, MLA, dense or experts, and how a scan stacks them: for layers, conversion and the FLOPs count."""

import dataclasses
from typing import Any, Final

GLA_LAYERS: Final = "gla_layers"
MLA_LAYER: Final = "mla_layer"
"""Modules of a scanned cycle: its GLA layers, themselves scanned, and its MLA layer. Checkpoints hold these names."""

FORMER_NAMES: Final = {"local_layers": GLA_LAYERS, "global_layer": MLA_LAYER}
"""Names in checkpoints of an earlier release -> today's."""

ROUTER_BIAS: Final = ("gate", "bias")
"""Path of the router bias in an MoE block."""


def is_mla(layer: int, num_layers: int, cycle: int) -> bool:
  """True if 0-based `layer` is MLA: every `cycle`-th layer, and all after the last whole cycle; others are GLA."""
  return (layer + 1) % cycle == 0 or layer >= num_layers // cycle * cycle


def shared_expert_width(config: Any) -> int:
  """Hidden width of one shared expert; all of them together are one MLP of `shared_experts` times this width."""
  return int(config.moe_shared_expert_dim or config.moe_mlp_dim)


def is_dense(layer: int, first_num_dense_layers: int) -> bool:
  """True if 0-based `layer` has a dense MLP; the others are mixtures of experts."""
  return layer < first_num_dense_layers


@dataclasses.dataclass(frozen=True)
class ScanLayout:
  """Which layers of a decoder are scanned.

  The scan is over whole cycles of layers with experts, each `cycle - 1` GLA layers and one MLA layer. The layers before
  it (up to the end of the cycle with the last dense layer) and after it (all MLA, see `is_mla`) are unscanned.

  Attributes:
    num_layers: number of layers in the decoder.
    cycle: number of layers in a cycle.
    start: 0-based index of the first scanned layer.
    num_blocks: number of scanned cycles; 0: nothing is scanned.
  """

  num_layers: int
  cycle: int
  start: int
  num_blocks: int

  @classmethod
  def of(cls, num_layers: int, cycle: int, first_num_dense_layers: int) -> "ScanLayout":
    """The layout of a decoder with these settings."""
    dense_cycles = -(-first_num_dense_layers // cycle)
    blocks = max(0, num_layers // cycle - dense_cycles)
    return cls(num_layers, cycle, min(dense_cycles * cycle, num_layers), blocks)

  @property
  def end(self) -> int:
    """0-based index after the last scanned layer."""
    return self.start + self.num_blocks * self.cycle

  @property
  def unscanned(self) -> tuple[range, range]:
    """Indices of the layers before and after the scanned ones."""
    return range(self.start), range(self.end, self.num_layers)

  def locate(self, layer: int) -> tuple[int, int] | None:
    """(block, position in the block) of a scanned layer; None for an unscanned one."""
    if not self.start <= layer < self.end:
      return None
    return divmod(layer - self.start, self.cycle)


def layer_names(path: tuple[Any, ...], config: Any) -> list[str]:
  """Names of the layers at a path of a model's state, `layer_NNN` or `mtp_layer_K`.

  Those of a layer scan are in the order of the raveled stack [blocks, layers of a block].
  """
  keys = [str(key) for key in path]
  if "mtp_block" in keys:
    return [next(key for key in keys if key.startswith("mtp_layer_"))]
  if "scanned_blocks" not in keys:
    index = int(next(key for key in keys if key.startswith("layers_")).removeprefix("layers_"))
    return [_layer_name(index)]
  layout = ScanLayout.of(
    config.num_decoder_layers, config.inhomogeneous_layer_cycle_interval, config.first_num_dense_layers
  )
  last = layout.cycle - 1
  positions = range(last) if GLA_LAYERS in keys else range(last, last + 1)
  starts = range(layout.start, layout.end, layout.cycle)
  return [_layer_name(start + position) for start in starts for position in positions]


def _layer_name(index: int) -> str:
  return f"layer_{index:03d}"
