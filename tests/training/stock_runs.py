"""Runs of MaxText's own trainer, `train.main`, several of them one after the other in each of few processes.

As a script: `python stock_runs.py FILE` with a JSON list of argument lists; each may begin with another trainer's module.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
BEGINNING = "=== a run begins ===\n"

SMALL = {
  "base_num_decoder_layers": 6,
  "moe_z_loss_weight": 1e-3,
  "sparse_matmul": False,
  "attention": "dot_product",
  "hardware": "cpu",
  "skip_jax_distributed_system": True,
  "override_model_config": True,
  "enable_goodput_recording": False,
  "enable_tensorboard": False,
  "log_config": False,
  "jax_cache_dir": "",
  "save_checkpoint_on_start": False,
  "save_checkpoint_on_completion": True,
  "async_checkpointing": False,
  "checkpoint_period": 1000,
  "learning_rate_schedule_steps": 10,
}


def write_documents(folder):
  """A Megatron data set of short random documents; returns the settings that read it, packed."""
  from maxtext_ling2.demo import data, train

  rng = np.random.default_rng(0)
  documents = [np.array([*rng.integers(3, 64, rng.integers(2, 30)), data.EOD], np.uint16) for _ in range(200)]
  data.write(documents, folder / "documents")
  settings = train.data_settings(data.Dataset(folder / "documents", len(documents), sum(map(len, documents))))
  return {key: value for key, value in settings.items() if key not in ("max_target_length", "per_device_batch_size")}


def arguments(folder, name, metrics, steps, **settings):
  """The command line of a run called `name` whose metrics go to `metrics`.jsonl."""
  from maxtext_ling2.maxtext_api import overrides
  from maxtext_ling2.maxtext_api.start import maxtext_folder
  from tiny import TINY

  given = {"run_name": name, "base_output_directory": folder, "metrics_file": folder / f"{metrics}.jsonl", "steps": steps}
  words = overrides.words({**TINY, **SMALL, **given, **settings})
  return [str(maxtext_folder() / "configs" / "base.yml"), *words]


def start(folder, *runs, script=__file__, **variables):
  """Starts a process that does the runs, with these environment variables on top."""
  file = folder / f"runs_{len(list(folder.glob('runs_*')))}.json"
  file.write_text(json.dumps(runs))
  environment = os.environ | variables | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
  command = [sys.executable, script, str(file)]
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder, *runs, **variables):
  """Does the runs in a process of their own; returns what it printed."""
  process = start(folder, *runs, **variables)
  output, _ = process.communicate()
  assert process.returncode == 0, output[-5000:]
  return output


def outputs(printed):
  """What each of the runs of a process printed."""
  return printed.split(BEGINNING)[1:]


def metrics(folder, name):
  """Metrics by step, without those of speed and memory."""
  lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
  keep = ("learning/", "optim/")
  training = [line for line in lines if "learning/loss" in line]
  return {int(line["step"]): {key: value for key, value in line.items() if key.startswith(keep)} for line in training}


def tensorboard(file):
  """Scalars by tag from an event file, which is a row of records (length 8 bytes, 4 of checksum, data, 4 of checksum)."""
  from tensorboardX.proto.event_pb2 import Event

  content, offset, scalars = file.read_bytes(), 0, {}
  while offset < len(content):
    size = int.from_bytes(content[offset : offset + 8], "little")
    event = Event.FromString(content[offset + 12 : offset + 12 + size])
    for value in event.summary.value:
      scalars.setdefault(value.tag, []).append(value.simple_value)
    offset += 16 + size
  return scalars


def checkpoint(folder, name, step):
  """All arrays of a checkpoint by path, from whatever devices they were on; random keys as integers."""
  import jax
  import orbax.checkpoint as ocp

  reader, items = ocp.PyTreeCheckpointer(), (folder / name / "checkpoints" / str(step) / "items").resolve()
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(items).item_metadata.tree)
  tree = reader.restore(items, restore_args=as_numpy)

  def plain(leaf):
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

  return {jax.tree_util.keystr(path): plain(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def weights(run_folder, step):
  """Parameters and biases of a checkpoint by path."""
  stored = checkpoint(run_folder.parent, run_folder.name, step)
  return {path: value for path, value in stored.items() if path.startswith("['params']")}


if __name__ == "__main__":
  from absl import flags

  flags.FLAGS([sys.argv[0]])  # as app.run does: grain reads flags
  for argv in json.loads(Path(sys.argv[1]).read_text()):
    sys.stderr.flush()
    print(BEGINNING, end="", flush=True)
    module, *words = argv if argv[0].startswith("maxtext.") else ["maxtext.trainers.pre_train.train", *argv]
    importlib.import_module(module).main(["train", *words])
