"""Our own import of an export, and of what transformers made of it: settings and logits."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from rows import LIMIT, folders, largest_difference, row, row_of_all

import maxtext_ling2
from maxtext_ling2.checkpoint import hf_config
from maxtext_ling2.verify.model import Float32Model

VERSION = maxtext_ling2.__version__


def wrong_settings(folder):
  """Settings that differ from those of the exported config.json, whose decay offset is known."""
  settings, expected = hf_config.to_maxtext(hf_config.read(folder.path)), hf_config.to_maxtext(folder.expected)
  expected["gla_decay_layer_offset"] = folder.offset
  return ", ".join(key for key in {**settings, **expected} if settings.get(key) != expected.get(key))


found = folders("exported", "saved")
row_of_all(VERSION, "settings", "none", [(folder, wrong_settings(folder)) for folder in found])
for folder in found:
  recorded = np.load(folder.logits)
  model = Float32Model(folder.path, *recorded["ids"].shape, gla_decay_layer_offset=folder.offset)
  difference = largest_difference(model.logits(recorded["ids"]), recorded[f"offset_{folder.offset}"])
  row(VERSION, f"{folder.kind} {folder.case}: logits with offset {folder.offset}", difference, difference <= LIMIT)
