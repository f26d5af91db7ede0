"""A view of the config that makes MaxText's experts route like DeepSeek-V3, with kernel tiles chosen by chip.

`RoutedMoE` decides by the model's name and the decoder block; for an unknown name it silently routes by a softmax over
biased scores, without groups. The view therefore answers as the config of a DeepSeek-V3 model. `RoutedMoE` also reads the
tiles of its grouped matmuls from the config, where they have one size for all models and chips; for tiles that the user
has not set (`configs/tiles.py`) the view answers by chip and shape, once the mesh is known.
"""

import math
from typing import Any, NamedTuple

import jax

from maxtext_ling2.configs.tiles import BY_CHIP, TILES, padding
from maxtext_ling2.ops.devices import device_kind, kind_of
from maxtext_ling2.ops.experts import tiles as expert_tiles

_HIDDEN_AXES = ("tensor", "tensor_sequence", "autoregressive")
"""Mesh axes over which MaxText shards the experts' hidden width with `sparse_matmul` (mlp_no_fsdp)."""

_CONTEXT_IS_EXPERT = "cp-as-ep"
"""The custom_mesh_and_rule with which MaxText shards the experts over the context axis, too."""


class Placement(NamedTuple):
  """The properties of a mesh that decide about tiles."""

  kind: str  # device kind
  devices: int
  hidden: int  # shards of an expert's hidden width
  experts: int  # shards of the experts
  same: int  # devices with the same tokens and weights


def placement(mesh: Any, context_is_expert: bool = False) -> Placement:
  """The placement on a mesh.

  Args:
    mesh: JAX's mesh, concrete or abstract; its devices need not exist.
    context_is_expert: whether MaxText shards the experts over the context axis, too.
  """
  sizes = dict(mesh.shape)
  device = (mesh.abstract_mesh if isinstance(mesh, jax.sharding.Mesh) else mesh).abstract_device
  kind = kind_of(device) if device else device_kind()
  hidden = math.prod(sizes.get(axis, 1) for axis in _HIDDEN_AXES)
  experts = sizes.get("expert", 1) * (sizes.get("context", 1) if context_is_expert else 1)
  return Placement(kind, math.prod(sizes.values()), hidden, experts, sizes.get("tensor_transpose", 1))


class DeepSeekRoutingView:
  """Read-only view of a config for MaxText's MoE layers: DeepSeek-V3's routing, whole expert counts, tiles by chip.

  It is part of graph definitions, so views of the same config object and placement are equal and hash alike.
  `gradient_accumulation_steps` is 2 here: then `RoutedMoE` returns expert counts (int32 [E], of the whole batch), not a
  bias update from one microbatch.
  """

  __slots__ = ("_config", "_placement")

  def __init__(self, config: Any, mesh: Any):
    config = config._config if isinstance(config, DeepSeekRoutingView) else config
    object.__setattr__(self, "_config", config)
    object.__setattr__(self, "_placement", placement(mesh, _context_is_expert(config)))

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__"):  # copy and pickle look up methods: the config's own would return a config
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
    return self  # it is read-only

  def __reduce__(self) -> tuple[Any, ...]:
    return _restored, (self._config, self._placement)

  def __hash__(self) -> int:
    return hash((DeepSeekRoutingView, id(self._config), self._placement))


def _restored(config: Any, place: Placement) -> DeepSeekRoutingView:
  """Unpickles a view."""
  view = object.__new__(DeepSeekRoutingView)
  object.__setattr__(view, "_config", config)
  object.__setattr__(view, "_placement", place)
  return view


def _context_is_expert(config: Any) -> bool:
  rule = config.custom_mesh_and_rule
  return getattr(rule, "value", rule) == _CONTEXT_IS_EXPERT


def rows_per_expert(config: Any, place: Placement, evaluation: bool) -> float:
  """Tokens per expert on a device, with a balanced router: those of all devices over which the experts are sharded."""
  batch = config.micro_batch_size_to_eval_on if evaluation else config.micro_batch_size_to_train_on
  routed = batch * config.max_target_length * config.num_experts_per_tok
  return float(routed * place.hidden * place.experts * place.same / (place.devices * config.num_experts))


def _tile(config: Any, place: Placement, field: str) -> int:
  """The tile of a field that the user has not set: by chip, or MaxText's default off a TPU."""
  product, axis = TILES[field]
  rows = rows_per_expert(config, place, evaluation=field.startswith("eval_"))
  chunks = config.num_moe_emb_chunks if product.startswith("wi") else 0  # gate and up are computed in chunks of the width
  widths = {"embed_dim": config.emb_dim // max(chunks, 1), "mlp_dim": config.moe_mlp_dim // place.hidden}
  k_axis, n_axis = expert_tiles.AXES[product]
  itemsize = jax.numpy.dtype(config.dtype).itemsize
  tiles = expert_tiles.tiles(place.kind, product, widths[k_axis], widths[n_axis], rows, itemsize)
  if tiles is None:
    from maxtext.configs import types

    tile = int(types.MaxTextConfig.model_fields[field].default)
  else:
    tile = tiles[("batch_seq", k_axis, n_axis).index(axis)]
  if axis != "batch_seq" or field == (padded_to := padding(field)):
    return tile
  return math.gcd(tile, getattr(config, padded_to) or _tile(config, place, padded_to))
