"""What `maxtext-ling2 verify` does: read the files, compare, print the verdict."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from maxtext_ling2.checkpoint import model_yml, safetensors_file, verify, verify_checkpoint
from maxtext_ling2.checkpoint.verify import GradientReport, LogitsReport, Reference
from maxtext_ling2.checkpoint.verify_checkpoint import TensorReport
from maxtext_ling2.checkpoint.verify_mesh import VerifyMesh
from maxtext_ling2.configs.validation import CUSTOM_MODEL
from maxtext_ling2.host import session

Array = NDArray[Any]


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

  `settings` are MaxText's, such as gla_decay_layer_offset. With `decode`, so many tokens are read as prompts into the
  slots of a MaxEngine and the others one by one. `cut` is the mesh to run on.

  Raises:
    ValueError: the folder or a file is not what it must be; the text names what.
  """
  recorded = _load(reference)
  ids, expected = _tokens(reference, recorded, ids_key), _array(reference, recorded, logits_key)
  if expected.shape[:2] != ids.shape:
    raise ValueError(
      f"{reference}: {logits_key} is {expected.shape}, expected (*{ids.shape}, vocabulary) as {ids_key} has"
    )
  if decode is not None:
    if not 0 < decode < ids.shape[1]:
      raise ValueError(f"--decode {decode}: the rows of {reference} have {ids.shape[1]} tokens; read 1 to one less")
    if cut.devices > 1:
      raise ValueError("--decode with --mesh: decoding is verified on one device; leave one of them out")
    settings = {**settings, "max_prefill_predict_length": decode}
  model = Reference(folder, ids.shape[0], ids.shape[1], cut=cut, **settings)
  _check_ids(reference, ids, ids_key, model.config.vocab_size)
  if decode is None:
    report = verify.compare_logits(model.logits(ids), expected)
  else:
    report = verify.compare_logits(verify.decoded_logits(model, ids), expected[:, decode - 1 :])
  _print_logits(console, report)
  passed = report.passed
  if grads is not None:
    passed &= _gradients(console, model, ids, recorded, reference, grads, rows)
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
    settings: MaxText's, such as gla_decay_layer_offset and scan_layers.

  Raises:
    ValueError: one of the files is not what it must be; the text names what.
  """
  if checkpoint is None:
    with tempfile.TemporaryDirectory(prefix="maxtext-ling2-") as temporary:
      made = _convert(folder, Path(temporary), bool(settings.get("scan_layers")))
      return run_checkpoint(console, folder, made, reference, logits_key, ids_key, settings)
  config = verify.make_config(folder, 1, 16, **settings)
  reports = verify_checkpoint.compare(checkpoint, folder, config)
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
  restored = Reference(folder, ids.shape[0], ids.shape[1], checkpoint=checkpoint, **settings)
  report = verify.compare_logits(restored.logits(ids), expected)
  _print_logits(console, report)
  passed &= report.passed
  console.print("[green]PASS[/]" if passed else "[red]FAIL[/]")
  return passed


def _convert(folder: Path, temporary: Path, scan: bool) -> Path:
  """Makes a float32 checkpoint of a Hugging Face folder by MaxText's own command."""
  yml = temporary / "model.yml"
  yml.write_text(model_yml.text(folder), encoding="utf-8")
  return Path(session.convert(str(yml), CUSTOM_MODEL, str(folder), str(temporary / "checkpoint"), "float32", scan))


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
  recorded: Mapping[str, Array],
  reference: Path,
  grads: Path,
  rows: int | None,
) -> bool:
  """Compares gradients; ids and labels come from the gradients' own file where it has them."""
  expected = dict(_load(grads))
  source, tokens = (grads, expected) if "labels" in expected else (reference, recorded)
  labels = _array(source, tokens, "labels").astype(np.int32)
  ids = expected["input_ids"].astype(np.int32) if "input_ids" in expected else ids
  if labels.shape != ids.shape:
    raise ValueError(f"{source}: labels are {labels.shape}, expected {ids.shape} as the token ids")
  expected = {name: value for name, value in expected.items() if name not in ("labels", "input_ids")}
  mtp = [f"model.layers.{model.config.num_decoder_layers + k}." for k in range(model.config.mtp_num_layers)]
  with_mtp = any(name.startswith(tuple(mtp)) and np.any(value) for name, value in expected.items()) if mtp else False
  loss, ours = model.gradients(ids[:rows], labels[:rows], with_mtp)
  reports = list(verify.compare_gradients(ours, expected, model.padding_id))
  if not reports:
    raise ValueError(f"{grads}: holds no gradients; arrays under Hugging Face tensor names are expected")
  _print_gradients(console, loss, with_mtp, reports)
  return all(report.passed for report in reports)


def _print_logits(console: Console, report: LogitsReport) -> None:
  console.print(f"logits of {report.positions} positions")
  console.print(f"  max abs error {report.max_abs_error:.3e} (tolerance {verify.LOGITS_TOLERANCE:.0e})")
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
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except FileNotFoundError:
    raise ValueError(f"{path}: no such file") from None
  except Exception as error:
    raise ValueError(f"{path}: not a readable npz file of plain arrays ({error})") from error


def _array(path: Path, arrays: Mapping[str, Array], key: str) -> Array:
  if key not in arrays:
    raise ValueError(f"{path}: has no array '{key}'; it has {', '.join(sorted(arrays)[:12])} ...")
  return arrays[key]


def _tokens(path: Path, arrays: Mapping[str, Array], key: str) -> Array:
  ids = _array(path, arrays, key)
  if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f"{path}: {key} is {ids.dtype} {ids.shape}, expected integer token ids [rows, tokens]")
  return ids.astype(np.int32)


def _check_ids(path: Path, ids: Array, key: str, vocab_size: int) -> None:
  if ids.min() < 0 or ids.max() >= vocab_size:
    raise ValueError(
      f"{path}: {key} holds ids from {ids.min()} to {ids.max()}, but the model's vocabulary has {vocab_size}"
    )
