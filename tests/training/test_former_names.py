"""Checkpoints of scanned models saved under the module names of an earlier release: read, or refused with what to do.

Such a checkpoint is one of today's trainer in which the keys of all arrays are renamed.
"""

import json
import shutil

import numpy as np
import pytest
import tensorstore as ts
from etils import epath

from maxtext_ling2.checkpoint import stored_weights
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.model.layer_layout import FORMER_NAMES
from tiny import TINY
from training.stock_runs import SMALL, arguments, checkpoint, metrics, run, write_documents

SCANNED = {"scan_layers": True, "base_num_decoder_layers": 4, "inhomogeneous_layer_cycle_interval": 2}
SCANNED |= {"mtp_num_layers": 0, "learning_rate": 1e-4}
LAST, STEPS = 1, 3  # the step of the checkpoint, and the steps of a whole run


def former(text):
  for name, today in FORMER_NAMES.items():
    text = text.replace(today, name)
  return text


def with_former_names(source, target):
  """Copies the folder of a step, with former names in the keys of its arrays and in what lists them."""
  shutil.copytree(source, target, ignore=shutil.ignore_patterns("d", "manifest.ocdbt", "ocdbt.process_*", "_sharding"))
  stores = [
    ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/items/"}).result() for folder in (source, target)
  ]
  keys = stores[0].list().result()
  renamed = [former(key.decode()).encode() for key in keys]
  assert renamed != keys
  for key, new in zip(keys, renamed, strict=True):
    stores[1].write(new, stores[0].read(key).result().value).result()
  for file in ("_METADATA", *(f"array_metadatas/{file.name}" for file in (source / "items/array_metadatas").iterdir())):
    text = (source / "items" / file).read_text()
    (target / "items" / file).write_text(json.dumps(json.loads(former(text))))
  assert "local_layers" in (target / "items" / "_METADATA").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Three steps in one run; two steps saved, their checkpoint renamed, and the third step from each checkpoint."""
  folder = tmp_path_factory.mktemp("former").resolve()
  settings = write_documents(folder) | SCANNED
  run(
    folder,
    arguments(folder, "straight", "straight", STEPS, **settings),
    arguments(folder, "saved", "saved", LAST + 1, **settings),
  )
  saved = folder / "saved" / "checkpoints" / str(LAST)
  with_former_names(saved, folder / "resumed" / "checkpoints" / str(LAST))
  with_former_names(saved, folder / "former" / str(LAST))
  full_states = {"full_state": folder / "former" / str(LAST), "full_state_today": saved}
  run(
    folder,
    arguments(folder, "resumed", "resumed", STEPS, **settings),
    *(
      arguments(folder, name, name, STEPS, **settings, load_full_state_path=step / "items")
      for name, step in full_states.items()
    ),
  )
  return folder


def test_a_run_is_resumed_to_the_bit(folder):
  straight, resumed = metrics(folder, "straight"), metrics(folder, "resumed")
  assert resumed == {STEPS - 1: straight[STEPS - 1]}
  expected, found = (checkpoint(folder, name, STEPS - 1) for name in ("straight", "resumed"))
  assert set(found) == set(expected) and any("gla_layers" in path for path in found)
  for path, value in expected.items():
    np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_full_state_is_loaded(folder):
  """Weights and moments are those of the checkpoint made with today's names; data start at the first batch."""
  assert metrics(folder, "full_state") == metrics(folder, "full_state_today")
  assert min(metrics(folder, "full_state")) == LAST + 1


def config(**settings):
  return session.make_config(**{**TINY, **SMALL, **SCANNED, **settings})


def test_weights_alone_are_loaded(folder):
  cfg = config()
  mesh = session.make_mesh(cfg)
  expected, found = (
    session.restore(cfg, mesh, str(items)) for items in (folder / "saved/checkpoints/1/items", folder / "former/1/items")
  )
  assert set(found) == set(expected)
  for path, value in expected.items():
    np.testing.assert_array_equal(found[path], value, err_msg=str(path))


def test_export_and_verify_read_the_same_tensors(folder):
  cfg = config()
  expected, found = (
    stored_weights.open_weights(epath.Path(items), cfg)[1]
    for items in (folder / "saved/checkpoints/1/items", folder / "former/1/items")
  )
  assert set(found) == set(expected)
  for path, store in expected.items():
    np.testing.assert_array_equal(found[path].read().result(), store.read().result(), err_msg=str(path))


def test_from_pretrained_says_what_to_do(folder):
  from maxtext.utils import model_creation_utils

  cfg = config(load_parameters_path=str(folder / "former/1/items"))
  with pytest.raises(CheckpointError, match=r"local_layers, global_layer.*from_pretrained cannot load; .*to_huggingface"):
    model_creation_utils.from_pretrained(cfg)
