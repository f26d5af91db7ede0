"""What can be otherwise in another MaxText: something is removed, renamed, moved, or takes another parameter."""

import dataclasses

import drift_source
import pytest

from maxtext_ling2 import plugin
from maxtext_ling2.host.contract import HINT, CommandExpectation

REGISTRY = plugin.REGISTRY
SEAMS = {seam.name: seam for seam in REGISTRY.seams}


@dataclasses.dataclass(frozen=True)
class Case:
  """One thing that is otherwise."""

  kind: str
  seam: str
  module: str
  path: str
  parameter: str | None = None
  command: bool = False

  @property
  def id(self):
    return f"{self.kind}-{self.seam.replace(' ', '_')}-{self.path or self.module.rpartition('.')[2]}"


MMAP = {"dataset_type": "grain", "grain_file_type": "mmap", "grain_train_files": "a", "mmap_eod_id": 2}
CHATS = {"use_sft": True, "dataset_type": "hf", "hf_path": "json"}
USES = {
  "DiLoCo": {"enable_diloco": True},
  "DiLoCo checkpoint": {"enable_diloco": True},
  "compiler options": {},  # tuned_xla_flags is true
  "mmap documents": MMAP | {"add_bos": True, "packing": True, "grain_packing_type": "concat_then_split", "bos_id": 1},
  "mmap pipelines": MMAP | {"add_bos": False},
  "chats of grain": CHATS | {"dataset_type": "grain", "grain_file_type": "parquet", "grain_train_files": "a"},
  "chats of hf": CHATS,
  "errors in chats": CHATS,
  "stop": {},
  "checkpoint report": {"enable_diloco": False},
  "eval metrics": {"eval_interval": 1, "eval_steps": 1},
  "metrics file": {"metrics_file": "/nowhere/metrics.jsonl", "eval_interval": 1, "eval_steps": 1},
  "MFU": {},
  "quantization rules": {"use_qwix_quantization": True, "quantization": "fp8_full"},
  "pretrained weights": {"load_parameters_path": "/nowhere/0/items"},
  "former names in from_pretrained": {"load_parameters_path": "/nowhere/0/items"},
  "muon": {"opt_type": "muon"},
  "LoRA": {"lora": {"enable_lora": True, "lora_rank": 2, "lora_alpha": 4.0}},
  "post-training": {"load_parameters_path": "/nowhere/0/items"},
}
"""Settings of a run that uses a seam which others can do without."""
UNUSED = {"compiler options": {"tuned_xla_flags": False}}
"""Settings of one that does not, where MaxText's defaults use it."""


COMMANDS = {
  "result tokens": "maxtext.inference.decode_multi",
  "engine quantization": "maxtext.inference.decode_multi",
  "Hugging Face tables": "maxtext.checkpoint_conversion.to_maxtext",
  "stacked axes": "maxtext.checkpoint_conversion.to_maxtext",
  "to_maxtext": "maxtext.checkpoint_conversion.to_maxtext",
  "to_huggingface": "maxtext.checkpoint_conversion.to_huggingface",
}
"""Who needs the seams that training does not."""


def owners(case):
  """The seams that expect what a case takes away."""
  target = f"{case.module}:{case.path}"
  return [seam for seam in SEAMS.values() if target in [wanted.target for wanted in seam.expectations]]


def cases(kind):
  """The expectations of all seams to which this can happen."""
  for seam in SEAMS.values():
    for expectation in seam.expectations:
      module, _, path = expectation.target.partition(":")
      parameter = expectation.parameters[-1] if expectation.parameters else None
      if kind != "resigned" or parameter:
        yield Case(kind, seam.name, module, path, parameter, isinstance(expectation, CommandExpectation))


def first(found):
  """One case for each seam."""
  return list({case.seam: case for case in reversed(list(found))}.values())[::-1]


def each_module():
  """The modules after whose import seams are applied, with the first of these."""
  seams = {seam.module: seam for seam in reversed(REGISTRY.seams)}
  return [Case("moved", seam.name, module, "") for module, seam in reversed(seams.items())]


def one_each(kind):
  """For each seam the first of its expectations to which this can happen in MaxText's own source."""
  return first(case for case in cases(kind) if case.module.startswith("maxtext."))


AT_RUN_TIME = {kind: list(cases(kind)) for kind in ("removed", "renamed", "resigned")}
IN_THE_SOURCE = {"renamed": one_each("renamed"), "resigned": one_each("resigned"), "moved": each_module()}


def parametrize(found, often):
  """The cases by their names; those that are not among `often` run with `make test-all` and `pytest -m drift` alone."""
  marks = {case: [] if case in often else [pytest.mark.slow] for case in found}
  return pytest.mark.parametrize("case", [pytest.param(case, id=case.id, marks=marks[case]) for case in found])


def refused(text, case):
  """Whether an error or a warning names seam, expected, found and what to do."""
  target = f"{case.module}:{case.path}"
  assert any(f"seam '{seam.name}': expected {target}" in text for seam in owners(case)), text
  assert "; found " in text and HINT in text
  if case.kind == "resigned":
    assert f"{case.parameter}{drift_source.NEW}" in text.split("; found ")[1]
  elif case.path.endswith("__"):  # the base class or the metaclass has one
    assert f"; found {case.module}:{case.path} taking (" in text or "which does not satisfy the condition" in text
  else:
    assert "; found nothing of that name" in text
  return True
