"""What `maxtext-ling2 verify` does: checks its options, reads the files, compares, prints the verdict."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from maxtext_ling2.checkpoint import hf_config, model_yml, safetensors_file
from maxtext_ling2.configs.validation import CUSTOM_MODEL
from maxtext_ling2.errors import OptionError
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.maxtext_api.mesh import MeshSpec
from maxtext_ling2.verify import comparison, model, tensors
from maxtext_ling2.verify.comparison import GradientReport, LogitsReport
from maxtext_ling2.verify.model import Float32Model
from maxtext_ling2.verify.recording import Recording
from maxtext_ling2.verify.tensors import TensorReport

Array = NDArray[Any]

_ROUTER_BIAS = "expert_bias"


@dataclasses.dataclass(frozen=True)
class Request:
  """The arguments of the command; cli/checkpoints.py documents the options.

  Attributes:
    folder: the Hugging Face folder.
    overrides: KEY=VALUE settings of MaxText.
    reference: npz with token ids and the reference's logits.
    logits_key: array of logits [B, T, V] in it.
    ids_key: array of token ids [B, T] in it.
    decay_offset: gla_decay_layer_offset of the reference.
    grads: npz of gradients by Hugging Face tensor name.
    rows: number of sequences whose gradients are compared.
    scan: scan_layers.
    decode: number of tokens that are prefilled; the others are decoded one by one.
    remat: remat_policy.
    mesh: text of a mesh.
    orbax: MaxText checkpoint to compare with the folder.
    via_orbax: whether to convert the folder first and compare the result.
  """

  folder: Path
  overrides: Sequence[str] = ()
  reference: Path | None = None
  logits_key: str = "eval.logits"
  ids_key: str = "input_ids"
  decay_offset: int | None = None
  grads: Path | None = None
  rows: int | None = None
  scan: bool = False
  decode: int | None = None
  remat: str | None = None
  mesh: str = ""
  orbax: Path | None = None
  via_orbax: bool = False

  @property
  def settings(self) -> dict[str, Any]:
    """MaxText's settings, and `overrides`, which win over them."""
    given = {"gla_decay_layer_offset": self.decay_offset, "remat_policy": self.remat}
    chosen = {key: value for key, value in given.items() if value is not None}
    return {"scan_layers": self.scan, "overrides": tuple(self.overrides), **chosen}

  def check(self) -> None:
    """Raises OptionError unless the options fit together."""
    if self.orbax is not None and self.via_orbax:
      raise OptionError(f"--orbax {self.orbax} names a checkpoint and --via-orbax makes one; leave one of them out")
    if self.orbax is not None or self.via_orbax:
      for option, value in {"--grads": self.grads, "--rows": self.rows, "--decode": self.decode}.items():
        if value is not None:
          raise OptionError(f"{option} {value} goes with --reference alone; leave out --orbax and --via-orbax")
      if self.mesh:
        raise OptionError("--mesh goes with --reference; a checkpoint is compared on one device")
    elif self.reference is None:
      raise OptionError("pass --reference FILE, --orbax CHECKPOINT or --via-orbax: there is nothing to compare with")
    elif self.rows is not None and self.grads is None:
      raise OptionError(f"--rows {self.rows} is about gradients; pass --grads FILE too, or leave it out")


def run(console: Console, request: Request) -> bool:
  """Compares and prints; returns whether everything is within its tolerance.

  Raises:
    OptionError: the options do not fit together.
    ValueError: the folder or a file is invalid; the text names what.
  """
  request.check()
  mesh = MeshSpec.read(request.mesh)
  mesh.force_devices()
  if request.orbax is not None:
    passed = _checkpoint(console, request, request.orbax)
  elif request.via_orbax:
    with tempfile.TemporaryDirectory(prefix="maxtext-ling2-") as temporary:
      passed = _checkpoint(console, request, _convert(request, Path(temporary)))
  else:
    assert request.reference is not None  # `check` has seen to it
    passed = _reference(console, request, Recording.read(request.reference), mesh)
  console.print("PASS", style="green") if passed else console.print("FAIL", style="red")
  return passed


def _reference(console: Console, request: Request, recorded: Recording, mesh: MeshSpec) -> bool:
  """Compares the logits and gradients of the folder's weights with recorded ones."""
  settings = request.settings
  vocab_size = hf_config.to_maxtext(hf_config.read(request.folder))["vocab_size"]
  ids, expected = _recorded(recorded, request, vocab_size)
  gradients = None if request.grads is None else _Gradients.read(request, recorded, ids, vocab_size)
  if request.decode is not None:
    if not 0 < request.decode < ids.shape[1]:
      raise ValueError(
        f"--decode {request.decode}: the sequences of {recorded.path} have {ids.shape[1]} tokens; read 1 to one less"
      )
    if mesh.devices > 1:
      raise ValueError("--decode with --mesh: decoding is verified on one device; leave one of them out")
    settings["max_prefill_predict_length"] = request.decode
  ours = Float32Model(request.folder, ids.shape[0], ids.shape[1], mesh_spec=mesh, **settings)
  if request.decode is None:
    report = comparison.compare_logits(ours.logits(ids), expected)
  else:
    report = comparison.compare_logits(model.decoded_logits(ours, ids), expected[:, request.decode - 1 :])
  _print_logits(console, report)
  passed = report.passed
  return passed & gradients.compare(console, ours, request.rows) if gradients else passed


def _checkpoint(console: Console, request: Request, checkpoint: Path) -> bool:
  """Compares a MaxText checkpoint with the folder, tensor by tensor and by logits.

  Without a reference, the expected logits are those of the folder's own weights.
  """
  folder, settings = request.folder, request.settings
  config = model.make_config(folder, 1, 16, **settings)
  reports = tensors.compare(checkpoint, folder, config)
  _print_tensors(console, reports)
  if request.reference is None:
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 64), np.int32)
    stored = next(report.dtype for report in reports if not report.name.endswith(_ROUTER_BIAS))
    rounded = safetensors_file.dtype(stored)
    expected = Float32Model(folder, ids.shape[0], ids.shape[1], rounded_to=rounded, **settings).logits(ids)
  else:
    ids, expected = _recorded(Recording.read(request.reference), request, config.vocab_size)
  restored = Float32Model(folder, ids.shape[0], ids.shape[1], checkpoint=checkpoint, **settings)
  report = comparison.compare_logits(restored.logits(ids), expected)
  _print_logits(console, report)
  return report.passed and all(report.passed for report in reports)


def _recorded(recorded: Recording, request: Request, vocab_size: int) -> tuple[Array, Array]:
  """(token ids [B, T], logits [B, T, V]) of a reference."""
  ids = recorded.tokens(request.ids_key, vocab_size)
  return ids, recorded.logits(request.logits_key, (ids.shape[0], ids.shape[1], vocab_size))


def _convert(request: Request, temporary: Path) -> Path:
  """Converts the folder to a float32 checkpoint by MaxText's own command."""
  yml = temporary / "model.yml"
  yml.write_text(model_yml.text(request.folder), encoding="utf-8")
  target = str(temporary / "checkpoint")
  folder, overrides = str(request.folder), request.overrides
  return Path(session.convert(str(yml), CUSTOM_MODEL, folder, target, "float32", request.scan, overrides))


@dataclasses.dataclass(frozen=True)
class _Gradients:
  """Recorded gradients by Hugging Face tensor name, and the token ids and labels [B, T] of their loss."""

  expected: dict[str, Array]
  ids: Array
  labels: Array

  @classmethod
  def read(cls, request: Request, reference: Recording, ids: Array, vocab_size: int) -> "_Gradients":
    """Reads --grads; ids and labels are those of the reference if the file has none."""
    assert request.grads is not None
    recorded = Recording.read(request.grads)
    expected = recorded.gradients(model.make_config(request.folder, 1, 16, **request.settings))
    if "input_ids" in recorded:
      ids = recorded.tokens("input_ids", vocab_size)
    labels = (recorded if "labels" in recorded else reference).labels((ids.shape[0], ids.shape[1]), vocab_size)
    return cls(expected, ids, labels)

  def compare(self, console: Console, ours: Float32Model, rows: int | None) -> bool:
    """Compares and prints the gradients of the first `rows` sequences."""
    config = ours.config
    mtp = tuple(f"model.layers.{config.num_decoder_layers + k}." for k in range(config.mtp_num_layers))
    with_mtp = any(name.startswith(mtp) and np.any(value) for name, value in self.expected.items())
    loss, gradients = ours.gradients(self.ids[:rows], self.labels[:rows], with_mtp)
    reports = list(comparison.compare_gradients(gradients, self.expected, ours.padding_id))
    _print_gradients(console, loss, with_mtp, reports)
    return all(report.passed for report in reports)


def _print_tensors(console: Console, reports: list[TensorReport]) -> None:
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
