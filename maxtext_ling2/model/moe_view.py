"""How MaxText's MoE is told to route like DeepSeek-V3 for a model of another name, and which tiles its kernels take.

`RoutedMoE` decides by the model's name and by the decoder block; with any name it does not know it silently routes by a
softmax over biased scores, without groups. So it gets a view of the config that answers as a DeepSeek-V3 model would. And
it reads the tiles of its grouped products from the config, where they are one size for all models and chips; the view
answers for those that nobody has set (`configs/tiles.py`) once the mesh is known.
"""

import math
from typing import Any, NamedTuple

import jax

from maxtext_ling2.configs.tiles import BY_CHIP, TILES, padding
from maxtext_ling2.ops.devices import device_kind, kind_of
from maxtext_ling2.ops.experts import tiles as expert_tiles

_HIDDEN_AXES = ("tensor", "tensor_sequence", "autoregressive")
"""Mesh axes over which MaxText splits the experts' hidden width in `sparse_matmul` (mlp_no_fsdp); others split tokens."""

_CONTEXT_IS_EXPERT = "cp-as-ep"
"""The custom_mesh_and_rule with which MaxText's MoE divides the experts along the context axis."""


class Placement(NamedTuple):
  """What of a mesh decides about tiles."""

  kind: str  # of device
  devices: int
  hidden: int  # devices that share the hidden width of an expert
  experts: int  # devices that share the experts
  same: int  # devices that hold the same tokens and weights


def placement(mesh: Any, context_is_expert: bool = False) -> Placement:
  """Of a mesh whose devices need not be there, or of an abstract one.

  Args:
    mesh: JAX's.
    context_is_expert: whether MaxText divides the experts among the devices of the context axis, too.
  """
  sizes = dict(mesh.shape)
  device = (mesh.abstract_mesh if isinstance(mesh, jax.sharding.Mesh) else mesh).abstract_device
  kind = kind_of(device) if device else device_kind()
  hidden = math.prod(sizes.get(axis, 1) for axis in _HIDDEN_AXES)
  experts = sizes.get("expert", 1) * (sizes.get("context", 1) if context_is_expert else 1)
  return Placement(kind, math.prod(sizes.values()), hidden, experts, sizes.get("tensor_transpose", 1))


class DeepSeekRoutingView:
  """Read-only view of a config for MaxText's MoE layers: DeepSeek-V3's routing, whole expert counts, tiles by chip.

  It becomes part of graph definitions, so it is equal to, and hashes like, any view of the same config object for the
  same placement.
  `gradient_accumulation_steps` shows 2, for which `RoutedMoE` returns the expert counts themselves (int32 [E], of the
  whole batch) in place of a bias update computed from one microbatch.
  """

  __slots__ = ("_config", "_placement")

  def __init__(self, config: Any, mesh: Any):
    config = config._config if isinstance(config, DeepSeekRoutingView) else config
    object.__setattr__(self, "_config", config)
    object.__setattr__(self, "_placement", placement(mesh, _context_is_expert(config)))

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__"):  # copy and pickle ask for what they may call: the config's own would give a config
      raise AttributeError(name)
    if name == "model_name":
      return "deepseek3-ling2"
    if name == "decoder_block":
      from maxtext.common.common_types import DecoderBlockType

      return DecoderBlockType.DEEPSEEK
    if name == "float32_gate_logits":
      return True
    if name == "gradient_accumulation_steps":
      return 2
    value = getattr(object.__getattribute__(self, "_config"), name)
    return _tile(self._config, self._placement, name) if name in TILES and value == BY_CHIP else value

  def __setattr__(self, name: str, value: Any) -> None:
    raise AttributeError(f"{name}: a view of the config is read-only")

  def __eq__(self, other: object) -> bool:
    return (
      isinstance(other, DeepSeekRoutingView) and other._config is self._config and other._placement == self._placement
    )

  def __copy__(self) -> "DeepSeekRoutingView":
    return self

  def __deepcopy__(self, memo: Any) -> "DeepSeekRoutingView":
    return self  # it cannot be changed

  def __reduce__(self) -> tuple[Any, ...]:
    return _restored, (self._config, self._placement)

  def __hash__(self) -> int:
    return hash((DeepSeekRoutingView, id(self._config), self._placement))


def _restored(config: Any, place: Placement) -> DeepSeekRoutingView:
  """A view that was pickled."""
  view = object.__new__(DeepSeekRoutingView)
  object.__setattr__(view, "_config", config)
  object.__setattr__(view, "_placement", place)
  return view


def _context_is_expert(config: Any) -> bool:
  rule = config.custom_mesh_and_rule
  return getattr(rule, "value", rule) == _CONTEXT_IS_EXPERT


def rows_per_expert(config: Any, place: Placement, evaluation: bool) -> float:
  """Rows that an expert of a device is given by a balanced router: those of all devices that share the experts."""
  batch = config.micro_batch_size_to_eval_on if evaluation else config.micro_batch_size_to_train_on
  routed = batch * config.max_target_length * config.num_experts_per_tok
  return float(routed * place.hidden * place.experts * place.same / (place.devices * config.num_experts))


def _tile(config: Any, place: Placement, field: str) -> int:
  """The tile of a field that nobody has set: the chip's, or MaxText's own where there is no TPU."""
  product, axis = TILES[field]
  rows = rows_per_expert(config, place, evaluation=field.startswith("eval_"))
  chunks = config.num_moe_emb_chunks if product.startswith("wi") else 0  # gate and up are summed over parts of the width
  widths = {"embed_dim": config.emb_dim // max(chunks, 1), "mlp_dim": config.moe_mlp_dim // place.hidden}
  k_axis, n_axis = expert_tiles.AXES[product]
  itemsize = jax.numpy.dtype(config.dtype).itemsize
  tiles = expert_tiles.tiles(place.kind, product, widths[k_axis], widths[n_axis], rows, itemsize)
  if tiles is None:
    from maxtext.configs import types

    found = int(types.MaxTextConfig.model_fields[field].default)
  else:
    found = tiles[("batch_seq", k_axis, n_axis).index(axis)]
  if axis != "batch_seq" or field == (whole := padding(field)):
    return found
  return math.gcd(found, getattr(config, whole) or _tile(config, place, whole))
