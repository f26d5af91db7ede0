"""The decay offset of a Hugging Face folder: that of its config.json, the user's, or the default.

Only folders exported by this package have the key `gla_decay_layer_offset`; the official code has none.
"""

import logging
from pathlib import Path

from maxtext_ling2.errors import CheckpointError

FIELD = "gla_decay_layer_offset"
"""The key of config.json, and MaxText's field."""

logger = logging.getLogger("maxtext_ling2")


def check(folder: Path, stated: int | None, used: int) -> None:
  """Compares the offset that a folder states with the one in use; if it states none, logs which one is used.

  Args:
    folder: the Hugging Face folder.
    stated: the offset in its config.json; None if it has none.
    used: the offset in MaxText's config.

  Raises:
    CheckpointError: they differ.
  """
  refuse_another(folder, stated, used)
  if stated is None:
    logger.warning(unstated(folder, used))


def refuse_another(folder: Path, stated: int | None, used: int) -> None:
  """Raises CheckpointError if a folder states another offset than the one in use."""
  if stated is not None and stated != used:
    raise CheckpointError(
      f"{FIELD}={used}: config.json of {folder} says that its weights were trained with {FIELD}={stated}; leave "
      f"{FIELD} out to use that, or compare both with `maxtext-ling2 eval {folder} --text FILE --decay-offset both`"
    )


def unstated(folder: Path, used: int) -> str:
  """The log line for a folder that states no offset."""
  return (
    f"{folder}: config.json has no {FIELD}; using {used}. To find out which one the weights were trained with: "
    f"`maxtext-ling2 eval {folder} --text FILE --decay-offset both`"
  )
