"""Prints what MaxText makes of model_name=ling2-tiny, and how this process came to the plugin.

usage: real_config.py [spawn | fork]   in a worker; a spawned one has to find the plugin by its own means
"""

import json
import multiprocessing
import sys


def show():
  from maxtext.configs import pyconfig

  words = ["model_name=ling2-tiny", "log_config=false", "skip_jax_distributed_system=true", "base_output_directory=out"]
  config = pyconfig.initialize(["", f"{pyconfig.MAXTEXT_CONFIGS_DIR}/base.yml", *words])
  from maxtext_ling2 import startup

  answer = [config.model_name, config.decoder_block.value, config.gla_decay_layer_offset, startup.found_by]
  print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  if len(sys.argv) == 1:
    show()
  else:
    if sys.argv[1] == "fork":
      import maxtext  # noqa: F401  whose plugins the worker gets with all else
    worker = multiprocessing.get_context(sys.argv[1]).Process(target=show)
    worker.start()
    worker.join()
    sys.exit(worker.exitcode)
