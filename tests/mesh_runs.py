"""What a tiny model computes on forced CPU devices; a script, because a process has one number of devices.

`python mesh_runs.py FILE` with a JSON list of {"kind", "settings"}; writes FILE.npz with arrays named RUN/NAME.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
DEVICES = 8
ROWS = 8
PROMPT, STEPS = 12, 8


def train(settings):
  """Metrics and weights after two steps on packed data."""
  from tiny import Run, batch

  run = Run(**settings)
  result = {}
  for seed in range(2):
    metrics = run.step(batch(run.config, seed, rows=ROWS))
    result |= {f"metrics/{seed}/{name}": value for name, value in metrics.items()}
  return result | {f"weights/{'.'.join(path)}": value for path, value in run.weights().items()}


def decode(settings):
  """Logits of a prompt and of some steps after it."""
  import tiny
  from maxtext_ling2.maxtext_api.engine import Engine

  cfg = tiny.config(**settings)
  engine = Engine(cfg, tiny.weights(cfg))
  ids = np.random.default_rng(0).integers(1, cfg.vocab_size, PROMPT + STEPS)
  logits = [engine.prefill(ids[:PROMPT], 0)[1]]
  logits += [engine.step({0: token})[1][0] for token in ids[PROMPT:]]
  return {"logits": np.stack(logits)}


def collectives(settings):
  """Of GLA and its gradient on one long sequence: number and largest size (elements) of each kind of collective."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  import tiny
  from maxtext_ling2.maxtext_api import session
  from maxtext_ling2.model.sharded_gla import sharded_gla

  cfg = tiny.config(**settings)
  mesh = session.make_mesh(cfg)

  def loss(q, k, v, ids):
    o, _ = sharded_gla(q, k, v, jnp.full(4, -0.1), ids, mesh=mesh, backend="chunked")
    return (o**2).sum()

  tokens = NamedSharding(mesh, PartitionSpec(None, "context"))
  x = jax.ShapeDtypeStruct((1, 8192, 4, 8), jnp.float32, sharding=tokens)
  ids = jax.ShapeDtypeStruct((1, 8192), jnp.int32, sharding=tokens)
  with session.model_context(cfg, mesh):
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, ids).compile().as_text()
  found = {}
  for shape, kind in re.findall(
    r"= \(?\w+\[([\d,]*)\]\S* (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text
  ):
    size = int(np.prod([int(n) for n in shape.split(",") if n]))
    number, largest = found.get(kind, (0, 0))
    found[kind] = (number + 1, max(largest, size))
  return {kind: np.array(value) for kind, value in found.items()}


def gla_layer(settings):
  """Output and gradients of a layer, its kernels in the interpreter."""
  from jax.experimental.pallas import tpu as pltpu

  from gla_layer import output_and_gradients

  with pltpu.force_tpu_interpret_mode():
    return output_and_gradients(**settings)


def routed(settings, trains=True):
  """Steps under two routings, one of which overflows a device."""
  import routed_runs

  return routed_runs.steps(trains, settings)


KINDS = {
  "train": train,
  "decode": decode,
  "collectives": collectives,
  "gla_layer": gla_layer,
  "routed": routed,
  "scored": functools.partial(routed, trains=False),
}


def run(folder, devices, runs):
  """The results of runs [(kind, settings)] with so many devices, a dict of arrays for each."""
  file = folder / f"runs_{devices}.json"
  file.write_text(json.dumps(runs))
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
  paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
  environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths}
  done = subprocess.run([sys.executable, __file__, str(file)], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-4000:]
  with np.load(f"{file}.npz") as found:
    return [
      {name.partition("/")[2]: found[name] for name in found if name.startswith(f"{index}/")}
      for index in range(len(runs))
    ]


if __name__ == "__main__":
  results = {}
  for number, (kind, options) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
    results |= {f"{number}/{name}": value for name, value in KINDS[kind](options).items()}
  np.savez(f"{sys.argv[1]}.npz", **results)
