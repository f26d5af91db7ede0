"""The command `maxtext-ling2`: doctor, verify, config, batch, generate, eval, plan, recipe, demo, run."""

import contextlib
import enum
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from maxtext_ling2.errors import describe


class DecayOffset(enum.StrEnum):
  """Values of --decay-offset."""

  zero = "0"
  one = "1"
  both = "both"


app = typer.Typer(help="LING2 for stock MaxText.", no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def main() -> None:
  """Entry point of the console script."""
  app()


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
  """Tell whether a LING2 run would work here; exit 0 only if it would."""
  from maxtext_ling2 import doctor as checks

  with contextlib.redirect_stdout(sys.stderr):  # MaxText prints while it is imported; stdout is for the JSON
    found = checks.diagnose()
  if as_json:
    print(json.dumps(found.to_json(), indent=2))
  else:
    console = Console(soft_wrap=True, highlight=False)
    for line in checks.lines(found):
      console.print(line)
  raise typer.Exit(0 if found.ok else 1)


_OVERRIDES = typer.Argument(metavar="[KEY=VALUE]...", help="Further settings of MaxText.")
_VERIFY_OFFSET = "gla_decay_layer_offset of the reference; the default is what config.json says, or 0."


@app.command()
def verify(
  folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face folder: config.json and safetensors.")],
  overrides: Annotated[list[str] | None, _OVERRIDES] = None,
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
  from maxtext_ling2.verify import command

  console = Console(soft_wrap=True, highlight=False)
  request = command.Request(
    folder, overrides or (), reference, logits_key, ids_key, decay_offset, grads, rows, scan, decode, remat, mesh, orbax,
    via_orbax,
  )  # fmt: skip
  try:
    passed = command.run(console, request)
  except command.OptionError as error:
    raise typer.BadParameter(str(error)) from error
  except (ValueError, KeyError, OSError) as error:
    _fail(error)
  raise typer.Exit(0 if passed else 1)


@app.command()
def config(
  folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face folder with config.json.")],
  output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write; the default prints it.")] = None,
) -> None:
  """Print the YAML file of a Hugging Face model, which MaxText takes as its base.yml with model_name=ling2-custom."""
  from maxtext_ling2.checkpoint import model_yml

  try:
    _check_output(output, "-o")
    text = model_yml.text(folder)
    if output is None:
      print(text, end="")
    else:
      output.write_text(text, encoding="utf-8")
  except (ValueError, OSError) as error:
    _fail(error)


@app.command()
def batch(
  settings: Annotated[
    list[str], typer.Argument(metavar="SETTINGS...", help="As for MaxText's trainer: a base YAML file, KEY=VALUE.")
  ],
  step: Annotated[int, typer.Option(min=0, help="Which batch, counted from 0.")] = 0,
  rows: Annotated[int, typer.Option(min=1, help="Number of rows to print.")] = 4,
  ids: Annotated[bool, typer.Option("--ids", help="Print a line per token: id, segment, position, target.")] = False,
  evaluation: Annotated[bool, typer.Option("--eval", help="Read the data of evaluation.")] = False,
  tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer for the text; the default is the settings'.")] = None,
  as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
  """Print a training batch as text with its loss marked, read by MaxText's data pipeline with these settings.

  For fine-tuning pass use_sft=true, which MaxText's trainers for it set themselves. The batch is that of this machine's
  devices.
  """
  from maxtext_ling2.batch import read, show

  try:
    with contextlib.redirect_stdout(sys.stderr):  # MaxText prints; stdout is for the batch
      found = read.read(settings, step, evaluation, tokenizer)
  except (ValueError, OSError) as error:
    _fail(error)
  if as_json:
    print(json.dumps(show.to_json(found, rows)))
  else:
    show.print_lines(Console(soft_wrap=True, highlight=False), found, rows, ids)


_CHECKPOINT = typer.Argument(metavar="CHECKPOINT", help="MaxText checkpoint or Hugging Face folder.")
_MODEL = typer.Option(
  "--model", help="model_name, or a YAML file written by `config`, for a MaxText checkpoint; the default is ling2."
)
_OFFSET_HELP = (
  "gla_decay_layer_offset; `both` tells which one the weights were trained with. The default is what the folder's "
  "config.json says, else 0."
)
_TOKENIZER = typer.Option(
  help="sentencepiece model or folder of a tokenizer; the default is the Hugging Face folder's, or ling2-tiny's."
)


_PROMPT_HELP = "Text to continue; - reads it from standard input; may be repeated."
_CHAT_HELP = (
  "JSON file of messages, or of several conversations, to answer; - reads it from standard input, which in a terminal is "
  "what you type."
)


@app.command()
def generate(
  checkpoint: Annotated[Path, _CHECKPOINT],
  overrides: Annotated[list[str] | None, _OVERRIDES] = None,
  prompt: Annotated[list[str] | None, typer.Option(help=_PROMPT_HELP)] = None,
  chat: Annotated[str | None, typer.Option(metavar="FILE", help=_CHAT_HELP)] = None,
  system_prompt: Annotated[str | None, typer.Option(help="System prompt of the conversation.")] = None,
  chat_template: Annotated[Path | None, typer.Option(help="Jinja file; the default is the tokenizer's.")] = None,
  model: Annotated[str | None, _MODEL] = None,
  tokenizer: Annotated[Path | None, _TOKENIZER] = None,
  tokens: Annotated[int, typer.Option("--tokens", "--max-tokens", help="Maximum number of tokens per answer.")] = 100,
  stop: Annotated[list[str] | None, typer.Option(help="Text before which an answer ends; may be repeated.")] = None,
  temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 takes the most likely token.")] = 0.0,
  top_k: Annotated[int, typer.Option(help="Sample among so many most likely tokens; 0: among all.")] = 0,
  top_p: Annotated[
    float, typer.Option(help="Sample among the most likely tokens that together have this probability.")
  ] = 1.0,
  seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampling.")] = 0,
  batch_size: Annotated[int, typer.Option(help="Prompts that decode together; the others wait.")] = 8,
  as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer.")] = False,
) -> None:
  """Continue texts, or answer conversations, with a trained model; prints the text as it is generated."""
  from maxtext_ling2.inference import command
  from maxtext_ling2.inference.generate import Options

  options = Options(tokens, temperature, top_k, top_p, seed, stop or (), batch_size, chat_template)
  request = command.Request(
    checkpoint, overrides or (), prompt or (), chat, system_prompt, model, tokenizer, options, as_json
  )
  try:
    command.run(request, sys.stdin, sys.stdout)
  except command.OptionError as error:
    raise typer.BadParameter(str(error)) from error
  except (ValueError, OSError) as error:
    _fail(error)
  except KeyboardInterrupt:
    raise typer.Exit(130) from None


@app.command("eval")
def evaluate(
  checkpoint: Annotated[Path, _CHECKPOINT],
  text: Annotated[Path, typer.Option(help="UTF-8 text file.")],
  overrides: Annotated[list[str] | None, _OVERRIDES] = None,
  model: Annotated[str | None, _MODEL] = None,
  tokenizer: Annotated[Path | None, _TOKENIZER] = None,
  length: Annotated[int, typer.Option(min=1, help="Tokens per context window.")] = 1024,
  decay_offset: Annotated[DecayOffset | None, typer.Option(help=_OFFSET_HELP)] = None,
) -> None:
  """Print loss, perplexity and bits per byte of a trained model on a text file.

  With --decay-offset both, print them for each decay offset, and which one the weights were trained with.
  """
  from maxtext_ling2.inference import compare_offsets as offsets
  from maxtext_ling2.inference import evaluate as evaluation
  from maxtext_ling2.inference.command import read_text

  try:
    with contextlib.redirect_stdout(sys.stderr):
      content = read_text(text)
      arguments: dict[str, Any] = {"model_name": model, "tokenizer": tokenizer, "length": length}
      arguments["overrides"] = overrides or ()
      if decay_offset is DecayOffset.both:
        found = offsets.compare_offsets(checkpoint, content, **arguments)
        scores = {f"gla_decay_layer_offset={offset}: ": score for offset, score in enumerate(found.scores)}
      else:
        offset = None if decay_offset is None else int(decay_offset)
        score = evaluation.evaluate(checkpoint, content, decay_offset=offset, **arguments)
        scores, found = {"": score}, None
  except (ValueError, OSError) as error:
    _fail(error)
  for which, score in scores.items():
    bits = f"{score.bits_per_byte:.4f} bits per byte"
    print(f"{which}loss {score.loss:.4f} nats per token, perplexity {score.perplexity:.2f}, {bits}")
  print(f"{score.tokens} tokens, {score.bytes} bytes")
  for line in [] if found is None else offsets.verdict(found):
    print(line)


@app.command()
def plan(
  model: Annotated[str, typer.Argument(metavar="MODEL", help="model_name, or a YAML file written by `config`.")],
  topology: Annotated[list[str], typer.Option(help="MaxText's compile_topology, such as v6e-64; may be repeated.")],
  overrides: Annotated[list[str] | None, _OVERRIDES] = None,
  mesh: Annotated[list[str] | None, typer.Option(help="Such as expert=8; may be repeated; the rest is FSDP.")] = None,
  recipe: Annotated[str | None, typer.Option(help="Name or file of a recipe; `maxtext-ling2 recipe` lists them.")] = None,
  search: Annotated[bool, typer.Option("--search", help="Rank meshes and batches, and compile the best two.")] = False,
  json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
  png: Annotated[Path | None, typer.Option(help="File for a plot.")] = None,
  no_cache: Annotated[bool, typer.Option("--no-cache", help="Compile also what has been compiled before.")] = False,
) -> None:
  """Compile a train step for chips without having them; print memory, time and whether it fits; exit 1 if not."""
  # The chips are described, not used: ignore those of this machine, and allow other compilers at the same time.
  os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  from maxtext_ling2.plan import command

  console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)
  chosen = {"--mesh": mesh, "--recipe": recipe, "--search": search}
  if len([option for option, value in chosen.items() if value]) > 1:
    both = " and ".join(option for option, value in chosen.items() if value)
    raise typer.BadParameter(f"{both}: each of them chooses a mesh; leave all but one out")
  request = command.Request(model, topology, mesh or [""], overrides or (), recipe, search, not no_cache)
  try:
    _check_output(json_file, "--json")
    _check_output(png, "--png", (".png", ".pdf", ".svg"))
    fits = command.run(console, request, json_file, png)
  except (ValueError, OSError) as error:
    _fail(error)
  raise typer.Exit(0 if fits else 1)


@app.command()
def recipe(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of the recipe.")] = None) -> None:
  """Print the path of a recipe, a base YAML file for training; without a name, list all recipes."""
  from maxtext_ling2.maxtext_api import recipes

  try:
    every = [*recipes.names(), *recipes.trainings()]
    lines = [str(recipes.file_of(name))] if name else [f"{one}: {recipes.title(one)}" for one in every]
  except ValueError as error:
    _fail(error)
  for line in lines:
    print(line)


@app.command()
def demo(
  output: Annotated[Path, typer.Option(help="Folder for data, checkpoint, metrics and plot.")] = Path("demo_output"),
  steps: Annotated[int | None, typer.Option(min=1, help="Training steps; the default takes minutes on 2 cores.")] = None,
) -> None:
  """Train ling2-tiny on real English text with the stock command and draw the loss curve."""
  from maxtext_ling2 import demo as demonstration

  raise typer.Exit(demonstration.run(output, steps))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context, module: Annotated[str, typer.Argument(help="As for python -m.")]) -> None:
  """Run `python -m MODULE ARGS...` with LING2, also where Python does not process .pth files."""
  from maxtext_ling2.run_module import run as run_module

  run_module([module, *context.args])


def _check_output(path: Path | None, option: str, suffixes: tuple[str, ...] = ()) -> None:
  """Raises ValueError if a file could not be written later, when the work for it is done."""
  if path is None:
    return
  if path.is_dir() or not path.parent.is_dir():
    why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
    raise ValueError(f"{option} {path}: {why}; name a file in a folder that exists")
  if suffixes and path.suffix not in suffixes:
    raise ValueError(f"{option} {path}: not the name of a picture; use one that ends in {' or '.join(suffixes)}")


def _fail(error: Exception) -> NoReturn:
  """Prints an error and exits with 1."""
  text: Any = error.args[0] if isinstance(error, KeyError) and error.args else error
  text = describe(error) if isinstance(error, OSError) else text
  Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/] {escape(str(text))}")
  raise typer.Exit(1)
