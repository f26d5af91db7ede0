"""A Hugging Face checkpoint: a folder of memory-mapped safetensors files, as views by tensor name.

Only `*.safetensors` and JSON files of the folder are opened: no pickles, no code.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from maxtext_ling2.checkpoint import hf_config, mapping, safetensors_file
from maxtext_ling2.errors import CheckpointError

logger = logging.getLogger("maxtext_ling2")

_TAKE_BOTH = (
  "take config.json and weights of one model, and the MaxText settings that `maxtext-ling2 config` prints for it"
)
INDEX = "model.safetensors.index.json"


class HfCheckpoint:
  """The tensors of a folder's `*.safetensors` files; a context manager.

  Files that the index does not list are read too: released checkpoints keep MTP in a separate one.

  Args:
    folder: the Hugging Face folder.

  Raises:
    CheckpointError: there is no safetensors file, a file does not parse, a tensor is in two files, or the index lists a
      file or a tensor that does not exist.
  """

  def __init__(self, folder: Path):
    self.folder = Path(folder)
    self._tensors: dict[str, NDArray[Any]] = {}
    self._files: dict[str, str] = {}

  def __enter__(self) -> "HfCheckpoint":
    indexed = _read_index(self.folder)
    # On foreign file systems macOS keeps attributes of NAME in "._NAME", which holds no tensors.
    paths = sorted(path for path in self.folder.glob("*.safetensors") if not path.name.startswith("._"))
    if not paths:
      raise CheckpointError(f"{self.folder}: no *.safetensors file; pass a Hugging Face folder with its weights")
    for path in paths:
      for name, tensor in safetensors_file.read(_inside(self.folder, path)).items():
        if name in self._files:
          raise CheckpointError(
            f"{path}: holds {name}, which {self._files[name]} holds too; keep one of the two files in the folder"
          )
        self._tensors[name], self._files[name] = tensor, path.name
    for name, file in indexed.items():
      if self._files.get(name) != file:
        raise CheckpointError(
          f"{self.folder / INDEX}: says that {name} is in {file}, but it "
          f"{f'is in {self._files[name]}' if name in self._files else 'does not exist'}; fetch the folder again"
        )
    return self

  def __exit__(self, *exc: Any) -> None:
    self._tensors.clear()

  def check(self, config: Any) -> None:
    """Compares the tensors with those of a model, by name and shape, before any data is read.

    The model may have fewer MTP layers than the folder (`mtp_num_layers=0` skips them), which is logged.

    Args:
      config: MaxText config of the model.

    Raises:
      CheckpointError: tensors are missing, unexpected or of another shape; they are named.
    """
    wanted = {name: entry.hf_shape for entry in mapping.entries(config) for name in entry.names}
    missing = sorted(set(wanted) - set(self._tensors))
    extra = sorted(set(self._tensors) - set(wanted))
    extra = self._without_skipped_mtp(extra, config)
    shapes = {name: self._tensors[name].shape for name in wanted if name in self._tensors}
    wrong = [f"{name} is {shape}, expected {wanted[name]}" for name, shape in shapes.items() if shape != wanted[name]]
    mtp = list(self._mtp_findings(wanted, missing, extra, config))
    explained = {name for _, names in mtp for name in names}
    problems = [
      f"{len(names)} {kind} tensor{'s' * (len(names) > 1)}: {'; '.join(names[:8])}{' ...' * (len(names) > 8)}"
      for kind, found in (("missing", missing), ("unexpected", extra), ("misshapen", wrong))
      if (names := [name for name in found if name not in explained])
    ]
    if problems:
      mtp.append((f"the weights are not those of the model, because of {'; '.join(problems)}; {_TAKE_BOTH}", []))
    if mtp:
      raise CheckpointError("\n".join(f"{self.folder}: {text}" for text, _ in mtp))

  def _without_skipped_mtp(self, extra: list[str], config: Any) -> list[str]:
    """Removes the tensors of MTP layers that config.json lists and the model does not have, and logs them."""
    first, end = config.num_decoder_layers + config.mtp_num_layers, config.num_decoder_layers + self._mtp_layers()
    skipped = [name for name in extra if first <= _layer(name) < end]
    if skipped:
      logger.warning(
        "%s: %d tensors of MTP (%s ...) are left out, as mtp_num_layers=%d says.",
        *(self.folder, len(skipped), skipped[0], config.mtp_num_layers),
      )
    return [name for name in extra if name not in set(skipped)]

  def mtp_problems(self, config: Any) -> list[str]:
    """Problems with MTP as a whole, one sentence each, which `check` raises; for its argument see there."""
    wanted = {name for entry in mapping.entries(config) for name in entry.names}
    missing, extra = sorted(wanted - set(self._tensors)), sorted(set(self._tensors) - wanted)
    return [f"{self.folder}: {text}" for text, _ in self._mtp_findings(wanted, missing, extra, config)]

  def _mtp_layers(self) -> int:
    return hf_config.read(self.folder).get("num_nextn_predict_layers") or 0

  def _mtp_findings(
    self, wanted: Iterable[str], missing: list[str], extra: list[str], config: Any
  ) -> Iterator[tuple[str, list[str]]]:
    """(problem with MTP as a whole, the tensors it explains)."""
    layers, stated = config.num_decoder_layers, self._mtp_layers()
    absent = [name for name in missing if _layer(name) >= layers]
    if absent and len(absent) == sum(_layer(name) >= layers for name in wanted):
      yield (
        f"num_nextn_predict_layers={stated} in config.json, but none of the {len(absent)} tensors of MTP ({absent[0]} "
        "...) is in the folder, as is common after fine-tuning; to go on without MTP pass mtp_num_layers=0 (for a named "
        "model with override_model_config=true)",
        absent,
      )
    more = [name for name in extra if _layer(name) >= layers]
    if any(name.endswith("eh_proj.weight") for name in more):
      files, count = sorted({self._files[name] for name in more}), len({_layer(name) for name in more})
      yield (
        f"{len(more)} tensors of {count} MTP layer(s) ({more[0]} ...) in {', '.join(files)}, but config.json has "
        f"num_nextn_predict_layers={stated}; to use them write num_nextn_predict_layers={stated + count} into "
        "config.json, to go on without them write that and pass mtp_num_layers=0",
        more,
      )

  def __getitem__(self, name: str) -> NDArray[Any]:
    """Returns a tensor as a read-only view of its file."""
    return self._tensors[name]

  def __contains__(self, name: str) -> bool:
    return name in self._tensors


def _layer(name: str) -> int:
  """Index of the layer that a tensor belongs to; -1 if it belongs to none."""
  found = re.match(r"model\.layers\.(\d+)\.", name)
  return int(found[1]) if found else -1


def _read_index(folder: Path) -> dict[str, str]:
  """Reads {tensor: file} of the folder's index; empty if there is none."""
  path = folder / INDEX
  if not path.exists():
    return {}
  try:
    index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=safetensors_file.unique_keys)
    files = {str(name): str(file) for name, file in index["weight_map"].items()}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IsADirectoryError) as error:
    raise CheckpointError(f"{path}: not an index with a weight_map ({error!r}); fetch the file again") from error
  for name, file in files.items():
    if Path(file).name != file or not file.endswith(".safetensors"):
      raise CheckpointError(
        f"{path}: {name} is listed in {file!r}, not a *.safetensors file of this folder; fetch the index again"
      )
    if not (folder / file).is_file():
      raise CheckpointError(f"{path}: names {file}, which is not in the folder; fetch the missing file")
  return files


def _inside(folder: Path, path: Path) -> Path:
  """Returns the path if it is a file of the folder, or a blob of the Hugging Face cache that the folder is part of."""
  real, home = path.resolve(), folder.resolve()
  blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
  if not real.is_file():
    raise CheckpointError(f"{path}: not a file; fetch it again")
  if real.parent not in (home, blobs):
    raise CheckpointError(f"{path}: a link to {real}, out of the folder; put the file itself into {folder}")
  return path
