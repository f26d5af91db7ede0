"""A very small LING2 through one of MaxText's commands, as `python -m` runs it; notes each compilation of a step.

`python counted_run.py COMMAND FOLDER KEY=VALUE...` prints a line `COMPILED [name, options]` for each, as XLA gets it.
COMMAND is a module, or `plan` for `compile_step`.
"""

import json
import os
import runpy
import sys
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", DECOUPLE_GCLOUD="TRUE")
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from jax._src import compiler
from stock_runs import arguments

SMALL = {
  "base_num_decoder_layers": 2,
  "first_num_dense_layers": 2,
  "inhomogeneous_layer_cycle_interval": 1,  # MLA, the quicker to compile
  "mtp_num_layers": 0,
  "moe_z_loss_weight": 0.0,
  "dataset_type": "synthetic",
  "enable_checkpointing": False,
  "eval_interval": 2,
  "eval_steps": 1,
}


def spy(original):
  def compile_or_get_cached(backend, module, devices, options, *args, **kwargs):
    name = module.operation.attributes["sym_name"].value
    if name.endswith("_step"):
      print("COMPILED " + json.dumps([name, dict(options.env_option_overrides)]), file=sys.__stdout__, flush=True)
    return original(backend, module, devices, options, *args, **kwargs)

  return compile_or_get_cached


def main(command, folder, *words):
  compiler.compile_or_get_cached = spy(compiler.compile_or_get_cached)
  yml, *settings = [*arguments(Path(folder), "counted", "counted", 2, **SMALL), *words]
  if command == "plan":
    from maxtext_ling2.host.compile_step import compile_step

    compile_step(yml, settings)
  else:
    sys.argv[1:] = [yml, *settings]
    runpy.run_module(command, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
