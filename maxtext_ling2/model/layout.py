"""Which layer is what: the one home of the rule that the layers, the conversion and the FLOPs count share."""


def is_mla(layer: int, num_layers: int, cycle: int) -> bool:
  """Whether 0-based `layer` is MLA: every `cycle`-th layer, and all layers after the last whole cycle; the others are GLA."""
  return (layer + 1) % cycle == 0 or layer >= num_layers // cycle * cycle


def is_dense(layer: int, first_num_dense_layers: int) -> bool:
  """Whether 0-based `layer` has a dense MLP; the others are mixtures of experts."""
  return layer < first_num_dense_layers
