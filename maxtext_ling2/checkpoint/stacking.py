"""Layout of the tensors of `mapping.py` in a scanned model: stacked over the cycles, and over a cycle's GLA layers.

MaxText stacks parameters on `param_scan_axis` and other variables on axis 0. In a nested scan the outer axis comes
before the inner one.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from maxtext_ling2.checkpoint.mapping import Entry, Path, entries
from maxtext_ling2.model.layer_layout import GLA_LAYERS, MLA_LAYER, ScanLayout


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One tensor of a MaxText model, scanned or not.

  Attributes:
    path: its path in the model.
    entries: the per-layer tensors it consists of: [[one]] if it is not stacked, else per cycle those of its layers.
    num_stacked_axes: 0, 1 (cycles) or 2 (cycles, layers of a cycle).
    axis: position of the first of them.
    is_parameter: whether it is a parameter in MaxText, rather than a router bias that only balancing updates.
  """

  path: Path
  entries: tuple[tuple[Entry, ...], ...]
  num_stacked_axes: int
  axis: int
  is_parameter: bool = True

  @property
  def first(self) -> Entry:
    """One of the per-layer tensors; they differ in nothing but path and names."""
    return self.entries[0][0]

  @property
  def names(self) -> Iterator[str]:
    """The Hugging Face tensors it consists of."""
    return (name for cycle in self.entries for entry in cycle for name in entry.names)

  @property
  def stacked_axes(self) -> tuple[int, ...]:
    """The axes of experts (if any), cycles and layers; an index into them selects one Hugging Face tensor."""
    experts = (0,) if len(self.first.names) > 1 else ()
    return (*experts, *range(self.axis, self.axis + self.num_stacked_axes))

  @property
  def keeps_dtype(self) -> bool:
    """Whether it stays float32, independently of the dtype that the others are saved in."""
    return self.first.keeps_dtype

  @property
  def table_key(self) -> str:
    """Its key in MaxText's conversion tables, which begins with the class of its variable."""
    return "-".join(("params" if self.is_parameter else "MoEBiasVar", *self.path))

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape in the model."""
    stacked = (len(self.entries), len(self.entries[0]))[: self.num_stacked_axes]
    one = self.first.shape
    return (*one[: self.axis], *stacked, *one[self.axis :])


def leaves(config: Any) -> list[Leaf]:
  """Lists all weights of a LING2 model in the layout of its config (`scan_layers`)."""
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
      cycle, position, rest = place
      kind = MLA_LAYER if position == layout.cycle - 1 else GLA_LAYERS
      stacks.setdefault(("decoder", "scanned_blocks", kind, *rest), []).append((cycle, entry))
  return singles + [_stacked(path, found, layout, config) for path, found in stacks.items()]


def _single(entry: Entry, config: Any) -> Leaf:
  return Leaf(entry.path, ((entry,),), 0, 0, _is_parameter(entry, config))


def _is_parameter(entry: Entry, config: Any) -> bool:
  return bool(not entry.keeps_dtype or config.enable_routed_bias_grad)


def _stacked(path: Path, found: list[tuple[int, Entry]], layout: ScanLayout, config: Any) -> Leaf:
  cycles = tuple(tuple(entry for c, entry in found if c == cycle) for cycle in range(layout.num_blocks))
  entry = cycles[0][0]
  is_parameter = _is_parameter(entry, config)
  axis = min(config.param_scan_axis, len(entry.shape)) if is_parameter else 0
  return Leaf(path, cycles, 1 if path[2] == MLA_LAYER else 2, axis, is_parameter)


def _place(entry: Entry, layout: ScanLayout) -> tuple[int, int, Path] | None:
  """(cycle, position in it, rest of the path) of a scanned layer's tensor."""
  root, layer, *rest = entry.path
  if root != "decoder" or not layer.startswith("layers_"):
    return None
  place = layout.locate(int(layer.removeprefix("layers_")))
  return None if place is None else (*place, tuple(rest))
