"""Functions and classes of ours that import JAX or MaxText, named now and imported when they are first called."""

import dataclasses
import importlib
from typing import Any

from maxtext_ling2.errors import Ling2Error


@dataclasses.dataclass(frozen=True)
class Lazy:
  """Calls what it names.

  Attributes:
    target: "module:attribute".
  """

  target: str

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self.resolved()(*args, **kwargs)

  def resolved(self) -> Any:
    """The function or class.

    Raises:
      Ling2Error: there is none of this name, or its module does not import.
    """
    module, _, name = self.target.partition(":")
    try:
      return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
      raise Ling2Error(f"{self.target} cannot be imported ({error}); install maxtext-ling2 again") from error
