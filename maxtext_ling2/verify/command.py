"""What `maxtext-ling2 verify` does: read the files, compare, print the verdict."""

import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from maxtext_ling2.checkpoint import hf_config, mapping, model_yml, safetensors_file
from maxtext_ling2.configs.validation import CUSTOM_MODEL
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.maxtext_api.mesh import VerifyMesh
from maxtext_ling2.verify import comparison, tensors
from maxtext_ling2.verify.comparison import GradientReport, LogitsReport, Reference
from maxtext_ling2.verify.tensors import TensorReport

Array = NDArray[Any]

_UNSCORED = -100
_RECORD_AGAIN = "record the reference again"


def run(
  console: Console,
  folder: Path,
  reference: Path,
  logits_key: str,
  ids_key: str,
  settings: Mapping[str, Any],
  grads: Path | None,
  rows: int | None,
  decode: int | None,
  cut: VerifyMesh,
) -> bool:
  """Compares and prints; returns the verdict.

  `settings` are MaxText's, such as gla_decay_layer_offset, and `words`, KEY=VALUE of the user. With `decode`, so many
  tokens are read as prompts into the
  slots of a MaxEngine and the others one by one. `cut` is the mesh to run on.

  Raises:
    ValueError: the folder or a file is not what it must be; the text names what.
  """
  recorded = _load(reference)
  ids, expected = _tokens(reference, recorded, ids_key), _array(reference, recorded, logits_key)
  vocab_size = hf_config.to_maxtext(hf_config.read(folder))["vocab_size"]
  ids = _check_ids(reference, ids, ids_key, vocab_size)
  _check_logits(reference, expected, logits_key, (*ids.shape, vocab_size))
  gradients = None if grads is None else _load(grads)
  if grads is not None and gradients is not None:
    _check_gradients(grads, gradients, comparison.make_config(folder, 1, 16, **settings))
    shape = gradients["input_ids"].shape if "input_ids" in gradients else ids.shape
    source, arrays = (grads, gradients) if "labels" in gradients else (reference, recorded)
    labels = _labels(source, arrays, shape, vocab_size)
  if decode is not None:
    if not 0 < decode < ids.shape[1]:
      raise ValueError(f"--decode {decode}: the rows of {reference} have {ids.shape[1]} tokens; read 1 to one less")
    if cut.devices > 1:
      raise ValueError("--decode with --mesh: decoding is verified on one device; leave one of them out")
    settings = {**settings, "max_prefill_predict_length": decode}
  model = Reference(folder, ids.shape[0], ids.shape[1], cut=cut, **settings)
  if decode is None:
    report = comparison.compare_logits(model.logits(ids), expected)
  else:
    report = comparison.compare_logits(comparison.decoded_logits(model, ids), expected[:, decode - 1 :])
  _print_logits(console, report)
  passed = report.passed
  if gradients is not None:
    passed &= _gradients(console, model, ids, labels, gradients, rows)
  console.print("[green]PASS[/]" if passed else "[red]FAIL[/]")
  return passed


def run_checkpoint(
  console: Console,
  folder: Path,
  checkpoint: Path | None,
  reference: Path | None,
  logits_key: str,
  ids_key: str,
  settings: dict[str, Any],
) -> bool:
  """Compares a MaxText checkpoint with a Hugging Face folder, tensor by tensor and by logits; returns the verdict.

  Args:
    console: where to print.
    folder: the Hugging Face folder.
    checkpoint: the MaxText checkpoint; None: one that MaxText's conversion command makes of the folder now.
    reference: npz with token ids and the reference's logits; None: those of the folder's own weights are it.
    logits_key: array of logits [B, T, V] in the reference.
    ids_key: array of token ids [B, T] in the reference.
    settings: MaxText's, such as gla_decay_layer_offset and scan_layers, and `words`, KEY=VALUE of the user.

  Raises:
    ValueError: one of the files is not what it must be; the text names what.
  """
  if checkpoint is None:
    with tempfile.TemporaryDirectory(prefix="maxtext-ling2-") as temporary:
      made = _convert(folder, Path(temporary), bool(settings.get("scan_layers")), settings.get("words", ()))
      return run_checkpoint(console, folder, made, reference, logits_key, ids_key, settings)
  config = comparison.make_config(folder, 1, 16, **settings)
  reports = tensors.compare(checkpoint, folder, config)
  _print_tensors(console, reports)
  passed = all(report.passed for report in reports)
  if reference is None:
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 64), np.int32)
    stored = next(report.dtype for report in reports if not report.name.endswith("expert_bias"))
    rounded = safetensors_file.dtype(stored)
    expected = Reference(folder, ids.shape[0], ids.shape[1], rounded_to=rounded, **settings).logits(ids)
  else:
    recorded = _load(reference)
    ids, expected = _tokens(reference, recorded, ids_key), _array(reference, recorded, logits_key)
    ids = _check_ids(reference, ids, ids_key, config.vocab_size)
    _check_logits(reference, expected, logits_key, (*ids.shape, config.vocab_size))
  restored = Reference(folder, ids.shape[0], ids.shape[1], checkpoint=checkpoint, **settings)
  report = comparison.compare_logits(restored.logits(ids), expected)
  _print_logits(console, report)
  passed &= report.passed
  console.print("[green]PASS[/]" if passed else "[red]FAIL[/]")
  return passed


def _convert(folder: Path, temporary: Path, scan: bool, words: Sequence[str]) -> Path:
  """Makes a float32 checkpoint of a Hugging Face folder by MaxText's own command."""
  yml = temporary / "model.yml"
  yml.write_text(model_yml.text(folder), encoding="utf-8")
  target = str(temporary / "checkpoint")
  return Path(session.convert(str(yml), CUSTOM_MODEL, str(folder), target, "float32", scan, words))


def _print_tensors(console: Console, reports: list[TensorReport]) -> None:
  """The verdict on all tensors, and a table of the worst of those that differ."""
  equal = sum(report.passed for report in reports)
  console.print(f"{equal} of {len(reports)} tensors bit-equal")
  worst = sorted((report for report in reports if not report.passed), key=lambda report: -report.max_abs_error)
  if not worst:
    return
  table = Table("tensor", "Hugging Face", "checkpoint", "differing elements", "max abs error", title="the worst tensors")
  for report in worst[:10]:
    count = f"{report.different} of {report.elements}"
    table.add_row(report.name, report.hf_dtype, report.dtype, count, f"{report.max_abs_error:.3e}")
  console.print(table)


def _gradients(
  console: Console,
  model: Reference,
  ids: Array,
  labels: Array,
  expected: Mapping[str, Array],
  rows: int | None,
) -> bool:
  """Compares gradients; ids come from the gradients' own file where it has them."""
  ids = expected["input_ids"].astype(np.int32) if "input_ids" in expected else ids
  expected = {name: value for name, value in expected.items() if name not in ("labels", "input_ids")}
  mtp = [f"model.layers.{model.config.num_decoder_layers + k}." for k in range(model.config.mtp_num_layers)]
  with_mtp = any(name.startswith(tuple(mtp)) and np.any(value) for name, value in expected.items()) if mtp else False
  loss, ours = model.gradients(ids[:rows], labels[:rows], with_mtp)
  reports = list(comparison.compare_gradients(ours, expected, model.padding_id))
  _print_gradients(console, loss, with_mtp, reports)
  return all(report.passed for report in reports)


def _print_logits(console: Console, report: LogitsReport) -> None:
  console.print(f"logits of {report.positions} positions")
  console.print(f"  max abs error {report.max_abs_error:.3e} (tolerance {comparison.LOGITS_TOLERANCE:.0e})")
  console.print(f"  max KL        {report.max_kl:.3e} nats")


def _print_gradients(console: Console, loss: float, with_mtp: bool, reports: list[GradientReport]) -> None:
  what = "mean token loss + MTP loss" if with_mtp else "mean token loss"
  within = sum(report.passed for report in reports)
  console.print(
    f"gradients of the {what} ({loss:.6f}): {within} of {len(reports)} tensors within tolerance, the worst three:"
  )
  for report in sorted(reports, key=lambda report: -report.excess)[:3]:
    console.print(f"  {report.name}: max abs error {report.max_abs_error:.3e}, {report.excess:.2f} of the tolerance")


def _load(path: Path) -> Mapping[str, Array]:
  """Reads an npz file without pickles."""
  try:
    with zipfile.ZipFile(path):  # np.load would take other files for pickles
      pass
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except FileNotFoundError:
    raise ValueError(f"{path}: no such file; name the npz that holds the reference") from None
  except Exception as error:
    raise ValueError(f"{path}: not a readable npz file of plain arrays ({error}); {_RECORD_AGAIN}") from error


def _array(path: Path, arrays: Mapping[str, Array], key: str) -> Array:
  if key not in arrays:
    raise ValueError(f"{path}: has no array '{key}'; name one that it has: {', '.join(sorted(arrays)[:12])} ...")
  return arrays[key]


def _tokens(path: Path, arrays: Mapping[str, Array], key: str) -> Array:
  ids = _array(path, arrays, key)
  if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(
      f"{path}: {key} is {ids.dtype} {ids.shape}, expected integer token ids [rows, tokens]; {_RECORD_AGAIN}"
    )
  if not ids.size:
    raise ValueError(f"{path}: {key} is {ids.shape} and holds no tokens; {_RECORD_AGAIN}")
  return ids


def _check_ids(path: Path, ids: Array, key: str, vocab_size: int) -> Array:
  if ids.min() < 0 or ids.max() >= vocab_size:
    raise ValueError(
      f"{path}: {key} holds ids from {ids.min()} to {ids.max()}, but the model's vocabulary has {vocab_size}; take the "
      "reference of this model"
    )
  return ids.astype(np.int32)  # not sooner, so that no id of 64 bits passes for another one


def _check_logits(path: Path, logits: Array, key: str, shape: tuple[int, ...]) -> None:
  if logits.shape != shape or not np.issubdtype(logits.dtype, np.floating):
    raise ValueError(
      f"{path}: {key} is {logits.dtype} {logits.shape}, expected float {shape} as the token ids and the vocabulary "
      f"have; {_RECORD_AGAIN}"
    )


def _check_gradients(path: Path, arrays: Mapping[str, Array], config: Any) -> None:
  shapes = {name: entry.hf_shape for entry in mapping.entries(config) for name in entry.names}
  named = [name for name in arrays if name not in ("labels", "input_ids")]
  if not named:
    raise ValueError(f"{path}: holds no gradients; arrays under Hugging Face tensor names are expected")
  for name in named:
    if name not in shapes:
      raise ValueError(f"{path}: the model has no parameter {name}; take the gradients of this model")
    if arrays[name].shape != shapes[name] or not np.issubdtype(arrays[name].dtype, np.floating):
      raise ValueError(
        f"{path}: {name} is {arrays[name].dtype} {arrays[name].shape}, expected float {shapes[name]}; {_RECORD_AGAIN}"
      )
  if "input_ids" in arrays:
    _check_ids(path, _tokens(path, arrays, "input_ids"), "input_ids", config.vocab_size)


def _labels(path: Path, arrays: Mapping[str, Array], shape: tuple[int, ...], vocab_size: int) -> Array:
  labels = _tokens(path, arrays, "labels")
  if labels.shape != shape:
    raise ValueError(f"{path}: labels are {labels.shape}, expected {shape} as the token ids; {_RECORD_AGAIN}")
  scored = labels != _UNSCORED
  checked = _check_ids(path, np.where(scored, labels, 0), "labels", vocab_size)
  return np.where(scored, checked, np.int32(_UNSCORED))
