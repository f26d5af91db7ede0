"""`verify` and `config`."""

from pathlib import Path
from typing import Annotated

import typer

from maxtext_ling2 import terminal
from maxtext_ling2.cli import options
from maxtext_ling2.cli.app import App
from maxtext_ling2.configs.validation import CUSTOM_MODEL


def register(app: App) -> None:
  """Adds the commands."""
  app.add(config, "maxtext-ling2 config HF_DIR", "maxtext-ling2 config HF_DIR -o my.yml")
  app.add(
    verify,
    "maxtext-ling2 verify HF_DIR --reference logits.npz",
    "maxtext-ling2 verify HF_DIR --orbax CHECKPOINT/0/items",
  )


_VERIFY_OFFSET = "gla_decay_layer_offset of the reference; the default is what config.json says, or 0."


def verify(
  folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face folder: config.json and safetensors.")],
  overrides: Annotated[list[str] | None, options.OVERRIDES] = None,
  reference: Annotated[Path | None, typer.Option(help="npz with token ids and the reference's logits.")] = None,
  logits_key: Annotated[str, typer.Option(help="Array of logits [B, T, V] in the reference.")] = "eval.logits",
  ids_key: Annotated[str, typer.Option(help="Array of token ids [B, T] in the reference.")] = "input_ids",
  decay_offset: Annotated[int | None, typer.Option(min=0, max=1, help=_VERIFY_OFFSET)] = None,
  grads: Annotated[Path | None, typer.Option(help="npz of gradients by Hugging Face tensor name.")] = None,
  rows: Annotated[int | None, typer.Option(min=1, help="Compare gradients on the first N sequences only.")] = None,
  scan: Annotated[bool, typer.Option("--scan", help="Scan the layers (scan_layers=true).")] = False,
  decode: Annotated[int | None, typer.Option(help="Prefill N tokens, decode the others step by step.")] = None,
  remat: Annotated[str | None, typer.Option(help="MaxText's remat_policy, such as full, minimal or none.")] = None,
  mesh: Annotated[str, typer.Option(help="Run on a mesh, such as fsdp=2,tensor=2,expert=2; forces CPU devices.")] = "",
  orbax: Annotated[Path | None, typer.Option(help="MaxText checkpoint (DIR/0/items) to compare with HF_DIR.")] = None,
  via_orbax: Annotated[bool, typer.Option("--via-orbax", help="Convert HF_DIR by MaxText's command first.")] = False,
) -> None:
  """Compare LING2 in float32 with recorded outputs of a reference; exit 1 if they differ by more than 1e-4.

  With --orbax or --via-orbax, compare a MaxText checkpoint with the folder: every tensor bit by bit, then the logits.
  KEY=VALUE such as mtp_num_layers=0 are settings of MaxText.
  """
  terminal.say_loading()
  from maxtext_ling2.verify import command

  request = command.Request(
    folder, overrides or (), reference, logits_key, ids_key, decay_offset, grads, rows, scan, decode, remat, mesh, orbax,
    via_orbax,
  )  # fmt: skip
  try:
    passed = command.run(terminal.console(), request)
  except KeyError as error:  # of a tensor that one of the two models does not have
    raise ValueError(error.args[0]) from error
  raise typer.Exit(0 if passed else 1)


def config(
  folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face folder with config.json.")],
  output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write; the default prints it.")] = None,
  force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
  """Print the YAML file of a Hugging Face model, which MaxText takes as its base.yml with model_name=ling2-custom."""
  from maxtext_ling2.checkpoint import model_yml

  options.check_output(output, "-o")
  if output is not None and output.exists() and not force:
    raise ValueError(f"-o {output}: exists already; pass --force to replace it, or name another file")
  text = model_yml.text(folder)
  if output is None:
    print(text, end="")
    return
  output.write_text(text, encoding="utf-8")
  use = f"MaxText takes it in place of its base.yml, with model_name={CUSTOM_MODEL}"
  terminal.console(stderr=True).print(f"wrote {output}, the settings of {folder}; {use}")
