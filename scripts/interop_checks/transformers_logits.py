"""The export opened by the newest transformers with its own PyTorch code, saved again, and opened again."""

import logging
import shutil

import numpy as np
import torch
import transformers
from rows import LIMIT, folders, largest_difference, row, row_of_all, wrong_sizes
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

VERSION = f"{transformers.__version__}, torch {torch.__version__.partition('+')[0]}"


class Warnings(logging.Handler):
  """Collects what transformers warns of."""

  def __init__(self):
    super().__init__(logging.WARNING)
    self.texts = []

  def emit(self, record):
    self.texts.append(record.getMessage())


def open_model(path, warnings):
  """The model in float32, and what was odd about its weights."""
  warnings.texts.clear()
  model, info = AutoModelForCausalLM.from_pretrained(
    path, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
  )
  odd = [f"{len(names)} {what}" for what, names in info.items() if names]
  return model.eval(), odd + [f"warning: {text.splitlines()[0]}" for text in warnings.texts]


def compare(folder, model, odd):
  """One row: the logits of a model against LING2's, and its weights if there is something odd about them."""
  recorded = np.load(folder.logits)
  with torch.no_grad():
    logits = model(torch.tensor(recorded["ids"])).logits.numpy()
  difference = largest_difference(logits, recorded[f"offset_{folder.offset}"])
  found = "; ".join([f"{difference:.1e}", *odd])
  row(VERSION, f"{folder.kind} {folder.case}: logits with offset {folder.offset}", found, difference <= LIMIT and not odd)


def tensors(path):
  """All weights of a folder, MTP's too."""
  return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def changed_weights(folder):
  """The weights of a saved folder that are not those of the export, bit by bit."""
  before, after = tensors(folder.work / "exported" / folder.case), tensors(folder.path)
  changed = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
  return ", ".join(changed + sorted(after.keys() - before.keys()))


warnings = Warnings()
logging.getLogger("transformers").addHandler(warnings)
for folder in folders("exported"):
  model, odd = open_model(folder.path, warnings)
  compare(folder, model, odd)
  saved = folder.work / "saved" / folder.case
  shutil.rmtree(saved, ignore_errors=True)
  model.save_pretrained(saved)
  AutoTokenizer.from_pretrained(folder.path).save_pretrained(saved)
found = folders("saved")
row_of_all(VERSION, "bits of all weights, MTP's too", "none", [(folder, changed_weights(folder)) for folder in found])
for folder in found:
  compare(folder, *open_model(folder.path, warnings))
configs = [
  (folder, AutoConfig.from_pretrained(folder.path, trust_remote_code=True)) for folder in folders("exported", "saved")
]
row_of_all(
  VERSION, "config.json, by AutoConfig", "none", [(folder, wrong_sizes(folder, config)) for folder, config in configs]
)
