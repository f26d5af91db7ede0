"""What a seam's handler is called through."""

import types

from maxtext_ling2.host.patches import Patches


def wrapped(handler, original):
  """The function that a seam puts in the place of `original`, by which `handler` answers for a LING2 config."""
  module = types.SimpleNamespace(function=original)
  Patches().wrap_for_ling2(module, "function", handler)
  return module.function
