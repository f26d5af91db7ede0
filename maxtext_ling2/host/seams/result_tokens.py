"""Seam: MaxEngine without JetStream.

MaxText then takes a stand-in for JetStream's ResultTokens, which MaxEngine's compiled functions cannot return, because
JAX does not know it as a pytree.
"""

import functools
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.seam import Seam

_ENGINE = "maxtext.inference.maxengine.maxengine"
_FIELDS = ("tokens_idx", "valid_idx", "length_idx", "samples_per_slot")


class ResultTokensSeam(Seam):
  """Registers the stand-in as a pytree. With JetStream installed there is nothing to do."""

  name = "result tokens"
  module = _ENGINE
  needed_for_training = False
  expectations = (Expectation(f"{_ENGINE}:engine_api.ResultTokens", holds=callable, meaning="a class"),)

  def apply(self) -> None:
    import jax
    from maxtext.inference.maxengine import maxengine

    cls = maxengine.engine_api.ResultTokens
    if getattr(maxengine.engine_api, "_IS_STUB", False) and not _is_pytree(cls):
      jax.tree_util.register_pytree_node(cls, _flatten, functools.partial(_unflatten, cls))


def _is_pytree(cls: type) -> bool:
  import jax

  return not jax.tree_util.all_leaves([cls()])


def _flatten(tokens: Any) -> tuple[Any, Any]:
  """Arrays as children; where tokens, validity and lengths stand in them is structure."""
  return (tokens.data, tokens.log_prob), tuple(getattr(tokens, name) for name in _FIELDS)


def _unflatten(cls: type, fields: Any, arrays: Any) -> Any:
  data, log_prob = arrays
  return cls(data=data, log_prob=log_prob, **dict(zip(_FIELDS, fields, strict=True)))
