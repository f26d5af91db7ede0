"""What the checks share: the folders to open, LING2's logits for them, and the lines that `scripts/interop` reads.

Runs in every environment, so it needs the standard library alone; NumPy where logits are compared.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LIMIT = 1e-4
"""The largest difference of a logit that float32 implementations may have."""

_NO_SIZES = {"auto_map", "transformers_weights", "rope_scaling", "architectures", "dtype", "torch_dtype"}


@dataclasses.dataclass(frozen=True)
class Folder:
  """A Hugging Face folder that a check opens.

  Attributes:
    path: the folder.
    case: the export it is, or was made from: offset_0, offset_1, yarn, fine_tuned.
    kind: "exported" by MaxText's command, or "saved" again by transformers' save_pretrained.
    work: the folder of the whole run.
  """

  path: Path
  case: str
  kind: str
  work: Path

  @property
  def offset(self) -> int:
    """The decay offset that it was exported with."""
    return int(self.case == "offset_1")

  @property
  def logits(self) -> Path:
    """LING2's own logits: an npz of ids [B, T], offset_0 and (without YaRN) offset_1 [B, T, V]."""
    return self.work / "logits" / f"{self.case}.npz"

  @property
  def expected(self) -> dict[str, Any]:
    """The exported config.json, which a saved folder must repeat."""
    return json.loads((self.work / "exported" / self.case / "config.json").read_text())


def folders(*kinds: str) -> list[Folder]:
  """The folders of these kinds that are there; the command line names the run's folder."""
  parser = argparse.ArgumentParser()
  parser.add_argument("work", type=Path)
  work = parser.parse_args().work
  there = [work / kind for kind in kinds if (work / kind).is_dir()]
  return [Folder(path, path.name, kind.name, work) for kind in there for path in sorted(kind.iterdir())]


def row(version: str, compared: str, difference: float | str, passed: bool | None) -> None:
  """Prints a row of the table; passed None: for information."""
  if isinstance(difference, float):
    difference = f"{difference:.1e}"
  print(json.dumps({"version": version, "compared": compared, "difference": difference, "passed": passed}), flush=True)


def row_of_all(version: str, compared: str, good: str, problems: Iterable[tuple[Folder, str]]) -> None:
  """Prints one row for several folders; none for none.

  Args:
    version: of what opened them.
    compared: what was compared.
    good: the difference where there is none.
    problems: for each folder what is wrong with it; an empty text is nothing.
  """
  problems = list(problems)
  if not problems:
    return
  kinds = ", ".join(dict.fromkeys(folder.kind for folder, _ in problems))
  wrong = "; ".join(f"{folder.kind} {folder.case}: {text}" for folder, text in problems if text)
  row(version, f"{kinds} ({len(problems)}): {compared}", wrong or good, not wrong)


def largest_difference(ours: Any, theirs: Any) -> float:
  """Of two arrays of logits; infinite where one is not a number, or the shapes differ."""
  import numpy as np

  if ours.shape != theirs.shape:
    return float("inf")
  return float(np.nan_to_num(np.abs(ours.astype(np.float64) - theirs), nan=np.inf).max())


def wrong_sizes(folder: Folder, config: Any) -> str:
  """The keys of the exported config.json that a configuration object has not, or has with another value."""
  expected, missing = folder.expected, object()
  values = {key: value for key, value in expected.items() if key not in _NO_SIZES}
  wrong = [key for key, value in values.items() if getattr(config, key, missing) != value]
  rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
  scaling = expected["rope_scaling"] or {"rope_type": "default"}
  wrong += [f"rope_scaling.{key}" for key, value in scaling.items() if key != "type" and rope.get(key) != value]
  return ", ".join(f"{key}={getattr(config, key, 'absent')!r}" for key in wrong)


def not_run(reason: object) -> None:
  """Ends the check with the reason why it could not run."""
  print(json.dumps({"not_run": " ".join(str(reason).split())}), flush=True)
  sys.exit(0)
