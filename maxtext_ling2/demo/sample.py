"""Last step of the demo: the trained model writes a paragraph, with the documented command."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from maxtext_ling2.demo.data import tokenizer_file
from maxtext_ling2.demo.errors import DemoError

PROMPT = "The for statement is used to"
TOKENS = 80


def command(model_name: str, checkpoint: Path) -> list[str]:
  """`maxtext-ling2 generate` for a checkpoint of the demo."""
  options = {"--model": model_name, "--tokenizer": tokenizer_file(), "--prompt": PROMPT, "--tokens": TOKENS}
  options |= {"--temperature": 0.7, "--top-p": 0.9}
  words = [str(word) for option in options.items() for word in option]
  return [sys.executable, "-m", "maxtext_ling2", "generate", str(checkpoint), *words]


def write(arguments: list[str], variables: Mapping[str, str], log: Path) -> str:
  """Runs the command and returns the prompt with the generated text.

  Args:
    arguments: from `command`.
    variables: environment variables beyond the user's.
    log: file that gets what MaxText prints.

  Raises:
    DemoError: the command has failed.
  """
  with log.open("ab") as errors:
    done = subprocess.run(arguments, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=errors)
  if done.returncode:
    raise DemoError(f"generating has failed with exit code {done.returncode}; see {log}")
  return done.stdout.decode(errors="replace").strip()
