"""Which modules of a LING2 model LoRA adapts: the pattern for MaxText's `lora.lora_module_path`, and kinds in words."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from maxtext_ling2.model.layer_layout import GLA_LAYERS, MLA_LAYER, layer_names

type Path = tuple[Any, ...]

EXPERTS = "MoeBlock_0"
"""The module of routed experts, whose kernels are its own parameters."""

_LAYER = rf"decoder/(layers_[0-9]+|scanned_blocks/({GLA_LAYERS}|{MLA_LAYER}))"
_ATTENTION = "query_key_value|output_gate|query|wq_a|wq_b|wkv_a|wkv_b|out"
_MLP = "wi_0|wi_1|wo"

MODULE_PATH = rf"{_LAYER}/(self_attention/({_ATTENTION})|(mlp|moe/shared_experts)/({_MLP}))"
"""LING2's `lora.lora_module_path`: all projections of GLA, MLA, dense and shared MLPs of the decoder, scanned or not.

Routers, routed experts, embeddings and MTP keep their weights. The whole path of a module must match.
"""


def enabled(config: Any) -> bool:
  """Whether a MaxText config asks for LoRA."""
  return bool(getattr(getattr(config, "lora", None), "enable_lora", False))


def kind(path: Path, modules: Mapping[Path, Any]) -> str:
  """The kind of a module, the same scanned or not: "gla/out", "mla/out", "mlp/wo", "shared_experts/wo", "experts".

  Args:
    path: the module's path in the model.
    modules: all modules by path.
  """
  if EXPERTS in path:
    return "/".join(("experts", *map(str, path[path.index(EXPERTS) + 1 :])))
  parent, name = str(path[-2]) if len(path) > 1 else "", str(path[-1])
  if parent == "self_attention":
    parent = "gla" if hasattr(modules[path[:-1]], "query_key_value") else "mla"
  return f"{parent}/{name}" if parent else name


def layers(path: Path, config: Any) -> int:
  """How many layers of the model a module serves: 1, or those of its scan."""
  in_a_layer = "scanned_blocks" in path or any(str(key).startswith(("layers_", "mtp_layer_")) for key in path)
  return len(layer_names(path, config)) if in_a_layer else 1


def counts(paths: Iterable[Path], modules: Mapping[Path, Any], config: Any) -> str:
  """How many layers have an adapted module of each kind, in words: "gla/out 8, mla/out 2, mlp/wo 1"."""
  found: Counter[str] = Counter()
  for path in paths:
    found[kind(path, modules)] += layers(path, config)
  return ", ".join(f"{name} {number}" for name, number in sorted(found.items()))
