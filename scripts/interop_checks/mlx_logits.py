"""The export opened by mlx-lm, which has a model of its own for it, on the CPU. It computes decay offset 0."""

import mlx_lm
import numpy as np
from rows import LIMIT, folders, largest_difference, not_run, row

try:
  import mlx.core as mx
  from mlx_lm.models.cache import make_prompt_cache
  from mlx_lm.utils import load
except ImportError as error:
  not_run(error)

VERSION = mlx_lm.__version__
mx.set_default_device(mx.cpu)


def token_by_token(model, ids):
  """Logits [B, T, V], with its cache."""
  cache = make_prompt_cache(model)
  return np.concatenate([np.array(model(mx.array(ids[:, i : i + 1]), cache=cache)) for i in range(ids.shape[1])], axis=1)


for folder in folders("exported", "saved"):
  name = f"{folder.kind} {folder.case}"
  try:
    model, _ = load(str(folder.path))
  except Exception as error:
    row(VERSION, f"{name}: load", f"{type(error).__name__}: {error}", False)
    continue
  recorded = np.load(folder.logits)
  ids = recorded["ids"].astype(np.int32)
  logits = np.array(model(mx.array(ids)))
  difference = largest_difference(logits, recorded["offset_0"])
  row(VERSION, f"{name}: logits with offset 0", difference, difference <= LIMIT)
  if folder.offset == 1:
    difference = largest_difference(logits, recorded["offset_1"])
    row(VERSION, f"{name}: logits with offset 1, which it does not compute", difference, None)
  if folder.kind == "exported" and folder.offset == 0:
    difference = largest_difference(token_by_token(model, ids), recorded["offset_0"])
    row(VERSION, f"{name}: logits with offset 0, token by token", difference, difference <= LIMIT)
