"""`generate` and `eval`."""

import contextlib
import enum
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from maxtext_ling2 import terminal
from maxtext_ling2.cli import options
from maxtext_ling2.cli.app import App


class DecayOffset(enum.StrEnum):
  """Values of --decay-offset."""

  zero = "0"
  one = "1"
  both = "both"


def register(app: App) -> None:
  """Adds the commands."""
  app.add(
    generate,
    'maxtext-ling2 generate CHECKPOINT --prompt "Once upon a time"',
    "maxtext-ling2 generate HF_DIR --chat - --temperature 0.7 --top-p 0.9",
  )
  app.add(evaluate, "maxtext-ling2 eval CHECKPOINT --text book.txt", name="eval")


_OFFSET_HELP = (
  "gla_decay_layer_offset; `both` tells which one the weights were trained with. The default is what the folder's "
  "config.json says, else 0."
)
_PROMPT_HELP = "Text to continue; - reads it from standard input; may be repeated."
_CHAT_HELP = (
  "JSON file of messages, or of several conversations, to answer; - reads it from standard input, which in a terminal is "
  "what you type."
)


def generate(
  checkpoint: Annotated[Path, options.CHECKPOINT],
  overrides: Annotated[list[str] | None, options.OVERRIDES] = None,
  prompt: Annotated[list[str] | None, typer.Option(help=_PROMPT_HELP)] = None,
  chat: Annotated[str | None, typer.Option(metavar="FILE", help=_CHAT_HELP)] = None,
  system_prompt: Annotated[str | None, typer.Option(help="System prompt of the conversation.")] = None,
  chat_template: Annotated[Path | None, typer.Option(help="Jinja file; the default is the tokenizer's.")] = None,
  model: Annotated[str | None, options.MODEL] = None,
  tokenizer: Annotated[Path | None, options.TOKENIZER] = None,
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
  terminal.say_loading()
  from maxtext_ling2.inference import command
  from maxtext_ling2.inference.generate import Options

  chosen = Options(tokens, temperature, top_k, top_p, seed, stop or (), batch_size, chat_template)
  request = command.Request(
    checkpoint, overrides or (), prompt or (), chat, system_prompt, model, tokenizer, chosen, as_json
  )
  command.run(request, sys.stdin, sys.stdout)


def evaluate(
  checkpoint: Annotated[Path, options.CHECKPOINT],
  text: Annotated[Path, typer.Option(help="UTF-8 text file.")],
  overrides: Annotated[list[str] | None, options.OVERRIDES] = None,
  model: Annotated[str | None, options.MODEL] = None,
  tokenizer: Annotated[Path | None, options.TOKENIZER] = None,
  length: Annotated[int, typer.Option(min=1, help="Tokens per context window.")] = 1024,
  decay_offset: Annotated[DecayOffset | None, typer.Option(help=_OFFSET_HELP)] = None,
) -> None:
  """Print loss, perplexity and bits per byte of a trained model on a text file.

  With --decay-offset both, print them for each decay offset, and which one the weights were trained with.
  """
  terminal.say_loading()
  from maxtext_ling2.inference import compare_offsets as offsets
  from maxtext_ling2.inference import evaluate as evaluation
  from maxtext_ling2.inference.command import read_text

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
  for which, score in scores.items():
    bits = f"{score.bits_per_byte:.4f} bits per byte"
    print(f"{which}loss {score.loss:.4f} nats per token, perplexity {score.perplexity:.2f}, {bits}")
  print(f"{score.tokens} tokens, {score.bytes} bytes")
  for line in [] if found is None else offsets.verdict(found):
    print(line)
