"""The table of LING2's tensors: MaxText's path <-> Hugging Face's name.

Every transform is a transpose, a reshape or a stack over experts. No value changes, so the inverse is exact.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from maxtext_ling2.model.layer_layout import ROUTER_BIAS, is_dense, is_mla, shared_expert_width

Array = NDArray[Any]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One MaxText tensor and the Hugging Face tensors it consists of.

  Attributes:
    path: its path in the (unscanned) MaxText model.
    names: the Hugging Face names: one, or one per expert.
    shape: its shape in MaxText.
    linear: whether Hugging Face keeps it as [out, in], the transpose of MaxText's [in..., out...].
    in_axes: number of leading axes of `shape` (after the experts') that are inputs of a linear map.
    keeps_dtype: whether it stays float32, independently of the dtype the others are saved in (the router bias).
  """

  path: Path
  names: tuple[str, ...]
  shape: tuple[int, ...]
  linear: bool = False
  in_axes: int = 1
  keeps_dtype: bool = False

  @property
  def one_shape(self) -> tuple[int, ...]:
    """MaxText shape of the part that corresponds to one Hugging Face tensor."""
    return self.shape[1:] if len(self.names) > 1 else self.shape

  @property
  def hf_shape(self) -> tuple[int, ...]:
    """Shape of each of the Hugging Face tensors."""
    if not self.linear:
      return self.one_shape
    inputs, outputs = self.one_shape[: self.in_axes], self.one_shape[self.in_axes :]
    return (math.prod(outputs), math.prod(inputs))

  def from_hf(self, tensor: Array) -> Array:
    """Views one Hugging Face tensor ([out, in] if linear) in MaxText's layout, `one_shape`."""
    return (tensor.T if self.linear else tensor).reshape(self.one_shape)

  def to_hf(self, part: Array) -> Array:
    """Views one part in Hugging Face's layout; the inverse of `from_hf`.

    Args:
      part: [in..., out...] of `one_shape`, or a range of its outputs.
    """
    return part.reshape(math.prod(part.shape[: self.in_axes]), -1).T if self.linear else part


def entries(config: Any) -> list[Entry]:
  """Lists all tensors of a model, layers in order.

  Args:
    config: MaxText config (HyperParameters) of a LING2 model.
  """
  c, embed = config, config.emb_dim
  found = [
    Entry(("token_embedder", "embedding"), ("model.word_embeddings.weight",), (c.vocab_size, embed)),
    Entry(("decoder", "decoder_norm", "scale"), ("model.norm.weight",), (embed,)),
    Entry(("decoder", "logits_dense", "kernel"), ("lm_head.weight",), (embed, c.vocab_size), linear=True),
  ]
  for i in range(c.num_decoder_layers):
    mla = is_mla(i, c.num_decoder_layers, c.inhomogeneous_layer_cycle_interval)
    found += _layer(c, ("decoder", f"layers_{i}"), f"model.layers.{i}.", mla, is_dense(i, c.first_num_dense_layers))
  for k in range(1, c.mtp_num_layers + 1):
    found += _mtp(c, k, f"model.layers.{c.num_decoder_layers + k - 1}.")
  return found


def _mtp(c: Any, k: int, hf: str) -> Iterator[Entry]:
  """MTP layer `k`, counted from 1; in Hugging Face it follows the decoder's layers."""
  base, embed = ("mtp_block", f"mtp_layer_{k}"), c.emb_dim
  yield Entry((*base, f"mtp_{k}_embedding_norm", "scale"), (f"{hf}enorm.weight",), (embed,))
  yield Entry((*base, f"mtp_{k}_hidden_state_norm", "scale"), (f"{hf}hnorm.weight",), (embed,))
  yield Entry((*base, f"mtp_{k}_projection", "kernel"), (f"{hf}eh_proj.weight",), (2 * embed, embed), linear=True)
  yield from _layer(c, (*base, f"mtp_{k}_transformer_layer"), hf, mla=True, dense=False)
  yield Entry((*base, f"mtp_{k}_final_norm", "scale"), (f"{hf}final_layernorm.weight",), (embed,))


def _layer(c: Any, path: Path, hf: str, mla: bool, dense: bool) -> Iterator[Entry]:
  embed = (c.emb_dim,)
  yield Entry((*path, "pre_self_attention_layer_norm", "scale"), (f"{hf}input_layernorm.weight",), embed)
  yield Entry((*path, "post_self_attention_layer_norm", "scale"), (f"{hf}post_attention_layernorm.weight",), embed)
  yield from (_mla if mla else _gla)(c, (*path, "self_attention"), f"{hf}attention.")
  if dense:
    yield from _swiglu((*path, "mlp"), f"{hf}mlp.", c.emb_dim, c.mlp_dim)
  else:
    yield from _experts(c, (*path, "moe"), f"{hf}mlp.")


def _gla(c: Any, path: Path, hf: str) -> Iterator[Entry]:
  embed, heads, dim = c.emb_dim, c.num_query_heads, c.head_dim
  yield Entry((*path, "query_key_value", "kernel"), (f"{hf}query_key_value.weight",), (embed, 3, heads, dim), linear=True)
  if c.use_qk_norm:
    yield Entry((*path, "query_norm", "scale"), (f"{hf}query_layernorm.weight",), (dim,))
    yield Entry((*path, "key_norm", "scale"), (f"{hf}key_layernorm.weight",), (dim,))
  yield Entry((*path, "output_gate", "kernel"), (f"{hf}g_proj.weight",), (embed, heads, dim), linear=True)
  yield Entry((*path, "output_norm", "scale"), (f"{hf}g_norm.weight",), (heads * dim,))
  yield Entry((*path, "out", "kernel"), (f"{hf}dense.weight",), (heads, dim, embed), linear=True, in_axes=2)


def _mla(c: Any, path: Path, hf: str) -> Iterator[Entry]:
  embed, heads, latent = c.emb_dim, c.num_query_heads, c.kv_lora_rank
  query = (heads, c.qk_nope_head_dim + c.qk_rope_head_dim)
  if c.q_lora_rank:
    yield Entry((*path, "wq_a", "kernel"), (f"{hf}q_a_proj.weight",), (embed, c.q_lora_rank), linear=True)
    yield Entry((*path, "q_norm", "scale"), (f"{hf}q_a_layernorm.weight",), (c.q_lora_rank,))
    yield Entry((*path, "wq_b", "kernel"), (f"{hf}q_b_proj.weight",), (c.q_lora_rank, *query), linear=True)
  else:
    yield Entry((*path, "query", "kernel"), (f"{hf}q_proj.weight",), (embed, *query), linear=True)
  down = (embed, latent + c.qk_rope_head_dim)
  yield Entry((*path, "wkv_a", "kernel"), (f"{hf}kv_a_proj_with_mqa.weight",), down, linear=True)
  yield Entry((*path, "kv_norm", "scale"), (f"{hf}kv_a_layernorm.weight",), (latent,))
  up = (latent, heads, c.qk_nope_head_dim + c.v_head_dim)
  yield Entry((*path, "wkv_b", "kernel"), (f"{hf}kv_b_proj.weight",), up, linear=True)
  yield Entry((*path, "out", "kernel"), (f"{hf}dense.weight",), (heads, c.v_head_dim, embed), linear=True, in_axes=2)


def _experts(c: Any, path: Path, hf: str) -> Iterator[Entry]:
  embed, experts, width = c.emb_dim, c.num_experts, c.moe_mlp_dim
  block = (*path, "MoeBlock_0")
  yield Entry((*block, "gate", "kernel"), (f"{hf}gate.weight",), (embed, experts), linear=True)
  if c.routed_bias:
    yield Entry((*block, *ROUTER_BIAS), (f"{hf}gate.expert_bias",), (experts,), keeps_dtype=True)
  for ours, theirs, shape in (
    ("wi_0", "gate_proj", (experts, embed, width)),
    ("wi_1", "up_proj", (experts, embed, width)),
    ("wo", "down_proj", (experts, width, embed)),
  ):
    yield Entry((*block, ours), tuple(f"{hf}experts.{e}.{theirs}.weight" for e in range(experts)), shape, linear=True)
  if c.shared_experts:
    shared = c.shared_experts * shared_expert_width(c)
    yield from _swiglu((*path, "shared_experts"), f"{hf}shared_experts.", embed, shared)


def _swiglu(path: Path, hf: str, embed: int, width: int) -> Iterator[Entry]:
  yield Entry((*path, "wi_0", "kernel"), (f"{hf}gate_proj.weight",), (embed, width), linear=True)
  yield Entry((*path, "wi_1", "kernel"), (f"{hf}up_proj.weight",), (embed, width), linear=True)
  yield Entry((*path, "wo", "kernel"), (f"{hf}down_proj.weight",), (width, embed), linear=True)
