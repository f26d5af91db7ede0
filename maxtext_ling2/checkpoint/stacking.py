"""Where the tensors of `mapping.py` stand in a scanned model: stacked over the blocks, and over a block's GLA layers.

MaxText stacks parameters on `param_scan_axis` and other variables on axis 0; a stack in a stack puts the outer axis
before the inner one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.checkpoint.mapping import Entry, Path, entries
from maxtext_ling2.model.layer_layout import GLA_LAYERS, MLA_LAYER, ScanLayout

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One tensor of a MaxText model, scanned or not.

  Attributes:
    path: where it stands in the model.
    members: the per-layer tensors it is stacked of: [[one]] if it is not stacked, else for each block its layers.
    depth: number of stacked axes: 0, 1 (blocks) or 2 (blocks, layers of a block).
    axis: where the outer one of them stands.
    is_parameter: whether it is a parameter in MaxText, rather than a router bias that only balancing moves.
  """

  path: Path
  members: tuple[tuple[Entry, ...], ...]
  depth: int
  axis: int
  is_parameter: bool = True

  @property
  def stacked_axes(self) -> tuple[int, ...]:
    """The axes of experts (if any), blocks and layers: fixing them picks what one Hugging Face tensor makes."""
    experts = (0,) if len(self.members[0][0].names) > 1 else ()
    return (*experts, *range(self.axis, self.axis + self.depth))

  @property
  def keeps_dtype(self) -> bool:
    """Whether it stays float32 whatever dtype the others are saved in."""
    return self.members[0][0].keeps_dtype

  @property
  def keys(self) -> tuple[str, ...]:
    """Where it stands in a checkpoint's `params`; router biases too (`host/seams/weight_variables.py`)."""
    return ("params", *self.path)

  @property
  def table_key(self) -> str:
    """Its key in MaxText's conversion tables, which begins with the class of its variable."""
    return "-".join(("params" if self.is_parameter else "MoEBiasVar", *self.path))

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape in the model."""
    stacked = (len(self.members), len(self.members[0]))[: self.depth]
    one = self.members[0][0].shape
    return (*one[: self.axis], *stacked, *one[self.axis :])

  def assemble(self, get: Callable[[Entry], Array]) -> Array:
    """Builds the tensor from those of its layers."""
    if self.depth == 0:
      return get(self.members[0][0])
    if self.depth == 1:
      return np.stack([get(block[0]) for block in self.members], axis=self.axis)
    blocks = [np.stack([get(entry) for entry in block], axis=self.axis) for block in self.members]
    return np.stack(blocks, axis=self.axis)

  def take_apart(self, tensor: Array) -> Iterator[tuple[Entry, Array]]:
    """The tensors of its layers; the inverse of `assemble`."""
    if self.depth == 0:
      yield self.members[0][0], tensor
      return
    for block, part in zip(self.members, np.moveaxis(tensor, self.axis, 0), strict=True):
      if self.depth == 1:
        yield block[0], part
        continue
      yield from zip(block, np.moveaxis(part, self.axis, 0), strict=True)


def leaves(config: Any) -> list[Leaf]:
  """All weights of a LING2 model in the layout of its config (`scan_layers`)."""
  if not config.scan_layers:
    return [_single(entry, config) for entry in entries(config)]
  layout = ScanLayout.of(
    config.num_decoder_layers, config.inhomogeneous_layer_cycle_interval, config.first_num_dense_layers
  )
  singles: list[Leaf] = []
  stacks: dict[Path, list[tuple[int, Entry]]] = {}
  for entry in entries(config):
    place = _place(entry, layout)
    if place is None:
      singles.append(_single(entry, config))
    else:
      block, position, rest = place
      kind = MLA_LAYER if position == layout.cycle - 1 else GLA_LAYERS
      stacks.setdefault(("decoder", "scanned_blocks", kind, *rest), []).append((block, entry))
  return singles + [_stack(path, members, layout, config) for path, members in stacks.items()]


def _single(entry: Entry, config: Any) -> Leaf:
  return Leaf(entry.path, ((entry,),), 0, 0, _is_parameter(entry, config))


def _is_parameter(entry: Entry, config: Any) -> bool:
  return bool(not entry.keeps_dtype or config.enable_routed_bias_grad)


def _stack(path: Path, members: list[tuple[int, Entry]], layout: ScanLayout, config: Any) -> Leaf:
  blocks = tuple(tuple(entry for b, entry in members if b == block) for block in range(layout.num_blocks))
  entry = blocks[0][0]
  is_parameter = _is_parameter(entry, config)
  axis = min(config.param_scan_axis, len(entry.shape)) if is_parameter else 0
  return Leaf(path, blocks, 1 if path[2] == MLA_LAYER else 2, axis, is_parameter)


def _place(entry: Entry, layout: ScanLayout) -> tuple[int, int, Path] | None:
  """(block, position, rest of the path) of a scanned layer's tensor."""
  root, layer, *rest = entry.path
  if root != "decoder" or not layer.startswith("layers_"):
    return None
  place = layout.locate(int(layer.removeprefix("layers_")))
  return None if place is None else (*place, tuple(rest))
