"""Arguments and options that several commands have, and checks of what they name."""

from pathlib import Path

import typer

OVERRIDES = typer.Argument(metavar="KEY=VALUE", help="Further settings of MaxText.")
CHECKPOINT = typer.Argument(metavar="CHECKPOINT", help="MaxText checkpoint or Hugging Face folder.")
MODEL = typer.Option(
  "--model", help="model_name, or a YAML file written by `config`, for a MaxText checkpoint; the default is ling2."
)
TOKENIZER = typer.Option(
  help="sentencepiece model or folder of a tokenizer; the default is the Hugging Face folder's, or ling2-tiny's."
)


def check_output(path: Path | None, option: str, suffixes: tuple[str, ...] = ()) -> None:
  """Raises ValueError if a file could not be written later, when the work for it is done.

  Args:
    path: of the file; None: there is none to write.
    option: that names it, for the text.
    suffixes: one of which its name must have; (): any.
  """
  if path is None:
    return
  if path.is_dir() or not path.parent.is_dir():
    why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
    raise ValueError(f"{option} {path}: {why}; name a file in a folder that exists")
  if suffixes and path.suffix not in suffixes:
    raise ValueError(f"{option} {path}: not the name of a picture; use one that ends in {' or '.join(suffixes)}")
