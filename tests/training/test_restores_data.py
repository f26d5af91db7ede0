"""Which rows of Megatron files come next after a restore, from MaxText's data iterator, saved as its trainer saves it.

A straight iterator gives 14 batches of 4 rows. Another one is saved after 9 of them, and a third one, restored from that
file, must go on with row 36. One epoch of the documents has 30 rows, so row 36 is in the second.
"""

import functools
import json

import numpy as np
import pytest
from absl import flags

import tiny
from maxtext_ling2.demo import data
from maxtext_ling2.maxtext_api import session

EOD, LENGTH, ROWS, BATCHES, SAVED = data.EOD, 24, 4, 14, 9
FIRST = SAVED * ROWS  # the row that comes next
WEIGHTS = (0.7, 0.3)
BLENDED, ALONE = True, False


def stock(**settings):
  return session.make_config(**{"model_name": "default", "vocab_size": 64, **settings})


def random_documents(low, high, number):
  """Documents of 3 to 30 tokens, the EOD at the end; the others are from low to high - 1."""
  rng = np.random.default_rng(low)
  return [np.array([*rng.integers(low, high, rng.integers(2, 30)), EOD], np.uint16) for _ in range(number)]


DOCUMENTS = {"low": random_documents(3, 34, 40), "high": random_documents(34, 64, 60)}
EPOCH = sum(map(len, DOCUMENTS["low"])) // LENGTH  # rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp("documents")
  for name, documents in DOCUMENTS.items():
    data.write(documents, made / name)
  return made


@pytest.fixture(autouse=True, scope="module")
def parsed_flags():
  """Grain reads them where it starts processes; MaxText's trainer has absl parse them."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["test"])


def iterator(folder, kind, blended, make=tiny.config, **settings):
  """MaxText's iterator of global batches."""
  from maxtext.input_pipeline import input_pipeline_interface

  files = [str(folder / name) if kind == "mmap" else f"{folder}/{name}_index|{folder}/{name}" for name in DOCUMENTS]
  mixture = ";".join(f"{file},{weight}" for file, weight in zip(files, WEIGHTS, strict=True))
  given = {
    "max_target_length": LENGTH,
    "dataset_type": "grain",
    "grain_file_type": kind,
    "grain_train_files": mixture if blended else files[0],
    "grain_worker_count": 0,
    "mmap_eod_id": EOD,
    "data_shuffle_seed": 7,
    "steps": BATCHES,
    "num_epoch": 4,
    "per_device_batch_size": ROWS,
    "packing": True,
    "packing_max_segments_per_sample": 0,
  }
  cfg = make(**given | settings)
  with session.model_context(cfg, mesh := session.make_mesh(cfg)):
    return input_pipeline_interface.create_data_iterator(cfg, mesh)[0]


def rows(batches, number):
  """[N, L], the tokens of so many batches."""
  return np.concatenate([np.asarray(next(batches)["inputs"]) for _ in range(number)])


@functools.cache
def straight_rows(folder, kind, blended, make=tiny.config, steps=BATCHES):
  """The rows of a run without a restore."""
  return rows(iterator(folder, kind, blended, make, steps=steps), steps)


def checkpointer(tmp_path):
  from maxtext.common import checkpointing

  return checkpointing.create_orbax_checkpoint_manager(str(tmp_path / "saved"), True, False, 1)


def save(tmp_path, batches):
  """As `checkpointing.save_checkpoint` does with what is called "iter"; returns what it has written."""
  from maxtext.common import grain_utility

  checkpointer(tmp_path).save_checkpointables(SAVED - 1, {"iter": grain_utility.for_save(SAVED - 1, batches, -1.0)})
  return json.loads((tmp_path / "saved" / str(SAVED - 1) / "iter" / "process_0-of-1.json").read_text())


def restore(tmp_path, batches):
  """As `checkpointing.load_state_if_possible` does."""
  from maxtext.common import grain_utility

  manager = checkpointer(tmp_path)
  abstract = {"iter": grain_utility.for_restore(manager, SAVED - 1, batches, -1.0)}
  manager.load_checkpointables(SAVED - 1, abstract)
  return batches


def saved(folder, tmp_path, *kind, **settings):
  """Saves after 9 batches; returns what is written."""
  before = iterator(folder, *kind, **settings)
  rows(before, SAVED)
  return save(tmp_path, before)


def megatron_blend(number):
  """Which data set each row of a blend is from: the one that is furthest behind its share. Megatron-LM, helpers.cpp."""
  counts, result = np.zeros(len(WEIGHTS)), []
  for index in range(number):
    result.append(int(np.argmax(np.array(WEIGHTS) * max(index, 1) - counts)))
    counts[result[-1]] += 1
  return np.array(result)


def origins(found):
  """Which data set each row is from, by its tokens [N, L]."""
  return (found.max(axis=1) >= 34).astype(int)


@pytest.mark.parametrize("make", [tiny.config, pytest.param(stock, marks=pytest.mark.slow)], ids=["ling2", "stock"])
@pytest.mark.parametrize("kind", ["mmap", "mmap_npy"])
def test_the_second_epoch_goes_on(folder, tmp_path, kind, make):
  assert EPOCH == 30 and EPOCH < FIRST < BATCHES * ROWS < 2 * EPOCH
  straight = straight_rows(folder, kind, ALONE, make)
  assert saved(folder, tmp_path, kind, ALONE, make) == {"next_index": FIRST}
  found = rows(restore(tmp_path, iterator(folder, kind, ALONE, make)), BATCHES - SAVED)
  np.testing.assert_array_equal(found, straight[FIRST:])
  if kind == "mmap":  # the second epoch, before and after the save, has 26 different rows of the 30 of the stream
    stream = np.concatenate(DOCUMENTS["low"])[: EPOCH * LENGTH].reshape(-1, LENGTH)
    second = set(map(tuple, np.concatenate([straight[EPOCH:FIRST], found])))
    assert len(second) == BATCHES * ROWS - EPOCH and second < set(map(tuple, stream))


@pytest.mark.parametrize("kind", [pytest.param("mmap", marks=pytest.mark.slow), "mmap_npy"])
def test_a_blend_goes_on(folder, tmp_path, kind):
  straight = straight_rows(folder, kind, BLENDED)
  saved(folder, tmp_path, kind, BLENDED)
  found = rows(restore(tmp_path, iterator(folder, kind, BLENDED)), BATCHES - SAVED)
  np.testing.assert_array_equal(found, straight[FIRST:])
  both = origins(np.concatenate([straight[:FIRST], found]))
  if kind == "mmap_npy":
    np.testing.assert_array_equal(both, megatron_blend(BATCHES * ROWS))
  share = np.cumsum(both) - WEIGHTS[1] * np.arange(1, 1 + len(both))
  assert np.abs(share).max() <= 1  # rows more or fewer than the weight asks for, after any number of rows


@pytest.mark.parametrize(
  ("kind", "blended"),
  [
    ("mmap", ALONE),
    ("mmap_npy", BLENDED),
    pytest.param("mmap", BLENDED, marks=pytest.mark.slow),
    pytest.param("mmap_npy", ALONE, marks=pytest.mark.slow),
  ],
)
def test_smaller_batches_go_on_with_the_same_row(folder, tmp_path, kind, blended):
  straight = straight_rows(folder, kind, blended)
  saved(folder, tmp_path, kind, blended)
  halves = {"per_device_batch_size": ROWS // 2, "steps": 2 * BATCHES}
  found = rows(restore(tmp_path, iterator(folder, kind, blended, **halves)), 2 * (BATCHES - SAVED))
  np.testing.assert_array_equal(found, straight[FIRST:])


# Steps before and after. 12 and 13 steps of 4 rows take less than 80 % of the second epoch, which is then shuffled
# apart from the first, as in Megatron-LM; 14 take more.
SAME_ORDER, OTHER_ORDER = (12, 13), (13, 14)


@pytest.mark.parametrize(
  ("steps", "make"),
  [(SAME_ORDER, tiny.config), (OTHER_ORDER, tiny.config), pytest.param(OTHER_ORDER, stock, marks=pytest.mark.slow)],
  ids=["same", "other", "other_stock"],
)
def test_other_steps_go_on_with_the_same_number_in_their_own_order(folder, tmp_path, steps, make):
  """`mmap_npy` shuffles by the epochs that `steps` needs, as Megatron-LM does; nothing says that the order is another."""
  assert [steps * ROWS - EPOCH > 0.8 * EPOCH for steps in (12, 13, 14)] == [False, False, True]
  before, after = (straight_rows(folder, "mmap_npy", ALONE, make, number) for number in steps)
  saved(folder, tmp_path, "mmap_npy", ALONE, make, steps=steps[0])
  found = rows(restore(tmp_path, iterator(folder, "mmap_npy", ALONE, make, steps=steps[1])), steps[1] - SAVED)
  np.testing.assert_array_equal(found, after[FIRST:])
  same = (after[: len(before)] == before).all(axis=1)
  assert same.all() if steps == SAME_ORDER else not same.any()


def test_workers_after_none_are_refused(folder, tmp_path):
  """MaxText's text names the iterator alone; grain's positions with and without processes have other keys."""
  saved(folder, tmp_path, "mmap", ALONE)
  with pytest.raises(Exception, match="Failed to load checkpointable: iter") as error:
    restore(tmp_path, iterator(folder, "mmap", ALONE, grain_worker_count=1))
  assert isinstance(error.value.__cause__, KeyError)
