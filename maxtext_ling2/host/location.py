"""Where MaxText is installed."""

import importlib.util
from pathlib import Path

from maxtext_ling2.errors import Ling2Error


class MaxTextMissingError(Ling2Error, ValueError):
  """MaxText is not installed."""


def maxtext_folder() -> Path:
  """The folder of the installed MaxText, found without importing it.

  Not through `maxtext.utils.globals`: importing it imports MaxText, and its MAXTEXT_ASSETS_ROOT names a folder that only
  MaxText's repository has.

  Raises:
    MaxTextMissingError: there is none.
  """
  spec = importlib.util.find_spec("maxtext")
  if spec is None or not spec.submodule_search_locations:
    raise MaxTextMissingError("MaxText is not installed; run: pip install 'maxtext-ling2[tpu]' (also right for CPUs)")
  return Path(spec.submodule_search_locations[0])
