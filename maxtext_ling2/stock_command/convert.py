"""`maxtext-ling2 convert` and `export`: MaxText's two conversions, printed, run and followed."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from maxtext_ling2.checkpoint import model_yml, safetensors_file
from maxtext_ling2.inference import saved_model
from maxtext_ling2.stock_command import next_commands, process, shell
from maxtext_ling2.stock_command.errors import StockCommandError
from maxtext_ling2.stock_command.log import Log
from maxtext_ling2.stock_command.progress import Shown, duration
from maxtext_ling2.stock_command.settings import Settings, Words, split
from maxtext_ling2.stock_command.sizes import size
from maxtext_ling2.training.checkpoint_report import readable

MODEL_YML = "model.yml"
"""The YAML file of a converted model, beside its checkpoint."""

_STEP = Path("0", "items")  # MaxText saves a converted checkpoint as step 0
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's, in the folder of a step
_PROGRESS = re.compile(r": (?P<done>[\d,]+) of (?P<size>[\d,]+) bytes, (?P<tensors>[\d,]+ of [\d,]+ tensors)$")
_MEGA = 1_000_000
_ON_CPU = {"hardware": "cpu", "skip_jax_distributed_system": True}


def convert(folder: Path, output: str, words: Sequence[str], console: Console) -> int:
  """Converts a Hugging Face folder to a MaxText checkpoint, OUTPUT/0/items.

  Without a model_name and a YAML file among the words, the model is the folder's own: its YAML file is written into
  OUTPUT/model.yml.

  Args:
    folder: the Hugging Face folder.
    output: MaxText's base_output_directory.
    words: a base YAML file, KEY=VALUE and flags, as for MaxText's command.
    console: where everything but the command's own output is shown.

  Returns:
    The exit code of MaxText's command.

  Raises:
    ValueError: the folder is not LING2's, or the words are no settings.
    StockCommandError: MaxText's command has failed.
  """
  given = split(words, flags=True)
  if given.yml is None and not Settings(given, shell.TO_MAXTEXT).given("model_name"):
    given = Words(str(_write_yml(folder, output, console)), given.settings, given.flags)
  settings = Settings(given, shell.TO_MAXTEXT)
  place = output if "://" in output else str(Path(output).resolve())
  added = _named(settings) | settings.unless_given({"base_output_directory": place, **_ON_CPU})
  dtype = _dtype(folder)
  flags = {"--hf_model_path": str(folder), **({"--save_dtype": dtype} if dtype == "float32" else {})}
  missing = [f"{flag}={value}" for flag, value in flags.items() if not _has_flag(given, flag)]
  arguments = [*shell.python_module(shell.TO_MAXTEXT), *given.all(added | settings.permission(added)), *missing]
  seconds = _run(arguments, place, "converting", console)
  items = Path(place, _STEP)
  console.print(f"checkpoint: {items} ({readable(size(items))}, {duration(seconds)})")
  same_dtype = not _has_flag(given, "--save_dtype")
  for title, text in _after_conversion(folder, items, settings, same_dtype):
    console.print(f"{title}:\n  {text}")
  return 0


def export(checkpoint: str, folder: Path, words: Sequence[str], console: Console) -> int:
  """Exports a MaxText checkpoint to a Hugging Face folder.

  Without a model_name and a YAML file among the words, the YAML file that `convert` has written is taken.

  Args:
    checkpoint: the folder of a step, its `items`, or all checkpoints of a run, of which the last is taken; or a URL of
      `items`.
    folder: the new folder.
    words: a base YAML file, KEY=VALUE and flags, as for MaxText's command.
    console: where everything but the command's own output is shown.

  Returns:
    The exit code of MaxText's command.

  Raises:
    ValueError: the checkpoint does not exist, or the words are no settings.
    StockCommandError: no model is named, or MaxText's command has failed.
  """
  given = split(words, flags=True)
  folder = folder.resolve()
  items = checkpoint if "://" in checkpoint else str(_items(Path(checkpoint)))
  if given.yml is None and not Settings(given, shell.TO_HUGGING_FACE).given("model_name"):
    given = Words(str(_yml_beside(Path(items))), given.settings, given.flags)
  settings = Settings(given, shell.TO_HUGGING_FACE)
  needed = {"base_output_directory": folder, "load_parameters_path": items, **_layout(Path(items))}
  added = _named(settings) | settings.unless_given({**needed, **_ON_CPU})
  arguments = [*shell.python_module(shell.TO_HUGGING_FACE), *given.all(added | settings.permission(added))]
  seconds = _run(arguments, str(folder), "exporting", console)
  console.print(f"folder: {folder} ({readable(size(folder))}, {duration(seconds)})")
  tokenizer = [] if any(folder.glob("tokenizer*")) else next_commands.tokenizer(settings) or _tiny_tokenizer()
  generate = next_commands.own("generate", folder, *tokenizer, "--prompt", next_commands.PROMPT)
  console.print(f"let it write:\n  {generate}")
  return 0


def _run(arguments: Sequence[str], output: str, title: str, console: Console) -> float:
  """Runs a conversion and shows its progress; returns its seconds.

  The log is beside the output, which must be empty or not exist.
  """
  variables = shell.environment("cpu")
  console.print(f"{title} with\n\n{shell.as_shell(arguments, variables)}\n")
  path = Path(f"{Path(output).name if '://' in output else output.rstrip('/')}.log").resolve()
  path.parent.mkdir(parents=True, exist_ok=True)
  console.print(f"log: {path}")
  log, begin = Log(path), time.monotonic()
  with Shown(console, "starting MaxText", "MB", digits=1) as shown:
    ended = process.run(arguments, variables, path, lambda: _watch(log, shown, title), lambda: shown.say("stopping"))
  if ended.code:
    if ended.signals:
      raise StockCommandError(f"stopped; nothing is left of {output} that would pass for complete", ended.code)
    raise StockCommandError(f"{title} has failed with exit code {ended.code}: {log.reason()}", ended.code)
  return time.monotonic() - begin


def _watch(log: Log, shown: Shown, title: str) -> None:
  for line in log.news(_PROGRESS):
    if (match := _PROGRESS.search(line)) is None:
      shown.say(line)
      continue
    done, whole = (int(match[name].replace(",", "")) / _MEGA for name in ("done", "size"))
    shown.stage(title)
    shown.advance(done, whole, match["tensors"])


def _named(settings: Settings) -> dict[str, str]:
  """model_name as a word, unless it is one: these commands of MaxText do not take it from a YAML file."""
  return {} if any(word.startswith("model_name=") for word in settings.words.settings) else {"model_name": settings.model}


def _write_yml(folder: Path, output: str, console: Console) -> Path:
  if "://" in output:
    raise StockCommandError(
      f"{output}: not a local folder, where the model's YAML file would go; write it first (`maxtext-ling2 config "
      f"{folder} -o model.yml`) and add model.yml to this command"
    )
  text, path = model_yml.text(folder), Path(output, MODEL_YML).resolve()
  if path.is_file() and path.read_text(encoding="utf-8") != text:
    raise StockCommandError(f"{path}: exists and is another model's; delete it, or choose another folder than {output}")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding="utf-8")
  console.print(f"the model's YAML file, as by `{next_commands.own('config', folder, '-o', path)}`: {path}")
  return path


def _after_conversion(folder: Path, items: Path, settings: Settings, same_dtype: bool) -> list[tuple[str, str]]:
  found = []
  if same_dtype:
    scan = ["--scan"] if settings.value("scan_layers") else []
    changed = [word for word in settings.words.settings if word.startswith("mtp_num_layers=")]
    verify = next_commands.own("verify", folder, *changed, "--orbax", items, *scan)
    found.append(("compare it with the folder, bit by bit, and its logits in float32", verify))
  tokenizer = ["--tokenizer", folder] if any(folder.glob("tokenizer*")) else ["--tokenizer", "TOKENIZER_FOLDER"]
  opened = next_commands.opened(settings)
  found.append(
    ("let it write", next_commands.own("generate", items, *opened, *tokenizer, "--prompt", next_commands.PROMPT))
  )
  words = next_commands.configured(settings)
  start = [f"load_parameters_path={items.resolve()}", f"scan_layers={str(bool(settings.value('scan_layers'))).lower()}"]
  return [*found, ("train from it (here on made-up tokens)", next_commands.own("train", *words, *start, *_MADE_UP))]


_MADE_UP = ("dataset_type=synthetic", "steps=2")


def _dtype(folder: Path) -> str | None:
  """The dtype of a folder's weights, by its first file; None if there is none."""
  file = min(folder.glob("*.safetensors"), default=None)
  if file is None:
    return None
  specs, _ = safetensors_file.read_header(file)
  dtypes = {spec.dtype for spec in specs.values()}
  return "float32" if dtypes == {"F32"} else None


def _items(checkpoint: Path) -> Path:
  items = saved_model.locate(checkpoint, None).items
  if items is None:
    raise StockCommandError(f"{checkpoint}: a Hugging Face folder already; pass a MaxText checkpoint")
  return items


def _yml_beside(items: Path) -> Path:
  path = items.parents[1] / MODEL_YML
  if not path.is_file():
    raise StockCommandError(
      "model_name: not given, and a MaxText checkpoint does not say what model it is; add model_name=ling2 or the like, "
      "or the model's YAML file"
    )
  return path


def _layout(items: Path) -> Mapping[str, Any]:
  """scan_layers as the checkpoint records it; nothing if it does not."""
  path = items.parent / _METADATA
  if not path.is_file():
    return {}
  recorded = json.loads(path.read_text(encoding="utf-8")).get("custom_metadata") or {}
  return {field: recorded[field] for field in ("scan_layers",) if isinstance(recorded.get(field), bool)}


def _tiny_tokenizer() -> list[str]:
  from maxtext_ling2.demo.data import tokenizer_file

  return ["--tokenizer", str(tokenizer_file())]


def _has_flag(words: Words, flag: str) -> bool:
  return any(word.partition("=")[0] == flag for word in words.flags)
