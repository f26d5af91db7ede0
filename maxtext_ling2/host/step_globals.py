"""The functions that MaxText's step calls, replaced while it is traced, whichever module holds the step."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host.contract import HINT


@contextlib.contextmanager
def patched_globals(step: Callable[..., Any], **wrappers: Callable[[Any], Any]) -> Iterator[None]:
  """Lets a step function of MaxText find `wrapper(value)` in place of each global `name`, for `name=wrapper`.

  Its globals are those of whichever module holds it, also when that module runs as `__main__`.

  Raises:
    Ling2Error: MaxText's module has no such name.
  """
  names = step.__globals__
  absent = [name for name in wrappers if name not in names]
  if absent:
    raise Ling2Error(f"MaxText's {step.__name__} has no {' and no '.join(absent)} that LING2 could replace; {HINT}")
  originals = {name: names[name] for name in wrappers}
  names.update({name: wrapper(originals[name]) for name, wrapper in wrappers.items()})
  try:
    yield
  finally:
    names.update(originals)
