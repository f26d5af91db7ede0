"""Checks settings as MaxText's trainer does, without training.

That is done in a process of its own, so that what MaxText prints goes into a log, and this one starts no accelerator.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from maxtext_ling2.maxtext_api import session
from maxtext_ling2.stock_command.errors import StockCommandError
from maxtext_ling2.stock_command.log import explain
from maxtext_ling2.stock_command.shell import FINE_TUNING

_FIELDS = ("steps", "global_batch_size_to_train_on", "max_target_length", "checkpoint_period", "enable_checkpointing")


def describe(words: Sequence[str], yml: str, module: str, variables: Mapping[str, str]) -> str:
  """Says what would be trained with these settings.

  Args:
    words: KEY=VALUE.
    yml: the base YAML file.
    module: MaxText's trainer.
    variables: environment variables beyond the user's.

  Raises:
    StockCommandError: MaxText refuses the settings; the text has its reason.
  """
  with tempfile.TemporaryDirectory() as folder:
    log, found = Path(folder, "log"), Path(folder, "found.json")
    arguments = [sys.executable, "-m", __name__, module, str(found), yml, *words]
    with log.open("wb") as output:
      code = subprocess.run(
        arguments, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
      ).returncode
    if code:
      text = log.read_text(errors="replace")
      raise StockCommandError(f"MaxText refuses these settings: {explain(text) or text}", code)
    values = json.loads(found.read_text())
  tokens = values["global_batch_size_to_train_on"] * values["max_target_length"]
  every = (
    f"a checkpoint every {values['checkpoint_period']:,} steps" if values["enable_checkpointing"] else "no checkpoint"
  )
  return (
    f"MaxText accepts these settings: {values['steps']:,} steps of {tokens:,} tokens "
    f"({values['global_batch_size_to_train_on']} x {values['max_target_length']}), {every}; nothing was trained"
  )


def main(arguments: Sequence[str]) -> None:
  """Writes the settings that `describe` reads into a file."""
  module, found, yml, *words = arguments
  config = session.trainer_config([*words, *(["use_sft=true"] if module == FINE_TUNING else [])], yml)
  Path(found).write_text(json.dumps({field: getattr(config, field) for field in _FIELDS}))


if __name__ == "__main__":
  main(sys.argv[1:])
