"""The commands that a summary proposes, each as text that can be pasted into a shell."""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxtext_ling2.configs.validation import CUSTOM_MODEL
from maxtext_ling2.maxtext_api import overrides
from maxtext_ling2.stock_command.run import Run
from maxtext_ling2.stock_command.settings import TINY_MODEL, Settings

PROMPT = "The for statement is used to"


def own(*words: str | Path) -> str:
  """A command of this package, as it can be called here."""
  name = "maxtext-ling2"
  begin = [name] if shutil.which(name) else [sys.executable, "-m", "maxtext_ling2"]
  return shlex.join([*begin, *map(str, words)])


def after_training(
  command: str, settings: Settings, added: Mapping[str, Any], run: Run, checkpoint: Path | None, stopped: bool
) -> list[tuple[str, str]]:
  """What can be done after a run, by title.

  Args:
    command: "train" or "sft".
    settings: of the run.
    added: settings that were added to the user's.
    run: its files.
    checkpoint: its last checkpoint in a local folder.
    stopped: whether it was stopped before its last step.
  """
  places = {field: added[field] for field in ("base_output_directory", "run_name") if field in added}
  words = settings.words.all(places)
  if stopped:
    return [("go on" if checkpoint else "begin again", own(command, *words))]
  kept = [word for word in words if not word.startswith("steps=")]
  found = [("train on, for as many steps again", own(command, *kept, f"steps={2 * run.steps}"))]
  if checkpoint is None:
    return found
  ask = ["--chat", "-"] if command == "sft" else ["--prompt", PROMPT]
  generate = own("generate", checkpoint, *opened(settings), *tokenizer(settings), *ask)
  export = own("export", checkpoint, run.folder / f"hf-{checkpoint.name}", *configured(settings))
  return [("let it write", generate), *found, ("export it for Hugging Face's libraries", export)]


def opened(settings: Settings) -> list[str]:
  """The words by which `generate` opens a model's checkpoint."""
  yml = _model_yml(settings)
  if yml is None:
    return ["--model", settings.model, *settings.model_words()]
  return ["--model", yml, *_named(settings), *settings.model_words()]


def configured(settings: Settings) -> list[str]:
  """The words by which MaxText's commands configure a model."""
  yml = _model_yml(settings)
  if yml is None:
    return [f"model_name={settings.model}", *settings.model_words()]
  return [yml, *_named(settings), *settings.model_words()]


def tokenizer(settings: Settings) -> list[str]:
  """The option of `generate` for a model's tokenizer; none where `generate` knows it."""
  path = settings.value("tokenizer_path")
  if path and settings.given("tokenizer_path"):
    return ["--tokenizer", str(path)]
  return [] if settings.model == TINY_MODEL else ["--tokenizer", "TOKENIZER_FOLDER"]


def _model_yml(settings: Settings) -> str | None:
  """The user's YAML file, if it says something about the model's sizes."""
  yml = settings.words.yml
  if yml and (settings.model == CUSTOM_MODEL or settings.yml_changes_the_model):
    return str(Path(yml).resolve())
  return None


def _named(settings: Settings) -> Sequence[str]:
  return [word for word in settings.words.settings if (overrides.split(word) or ("",))[0] == "model_name"]
