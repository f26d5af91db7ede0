"""Seconds to compile ling2's train step with scanned and with unscanned layers, and their ratio.

MaxText's own ahead-of-time compilation, for real TPU chips on a machine without any; each layout in a process of its own,
with a tiny model compiled first so that imports and the compiler's start count for neither. No cache of compiled
programs is used.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from maxtext_ling2.maxtext_api import overrides
from maxtext_ling2.maxtext_api.start import maxtext_folder

TINY = ("base_emb_dim=256", "base_num_decoder_layers=5", "num_experts=64", "base_moe_mlp_dim=128", "vocab_size=1024")


def arguments(scan: bool, topology: str, extra: tuple[str, ...] = ()) -> list[str]:
  settings = {
    "model_name": "ling2",
    "override_model_config": True,
    "scan_layers": scan,
    "compile_topology": topology,
    "compile_topology_num_slices": 1,
    "per_device_batch_size": 1,
    "log_config": False,
    "jax_cache_dir": "",
  }
  base = str(maxtext_folder() / "configs" / "base.yml")
  return ["train_compile", base, *overrides.words(settings), *extra]


def seconds(scan: bool, topology: str, layers: int) -> float:
  """Traces, lowers and compiles in this process."""
  from maxtext.trainers.pre_train import train_compile

  train_compile.main(arguments(scan, topology, TINY))
  start = time.perf_counter()
  train_compile.main(arguments(scan, topology, (f"base_num_decoder_layers={layers}",)))
  return time.perf_counter() - start


def measure(scan: bool, topology: str, layers: int) -> float:
  """The same in a new process."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "DECOUPLE_GCLOUD": "TRUE"}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  command = [sys.executable, str(Path(__file__).resolve()), "--topology", topology, "--layers", str(layers)]
  command += ["--layout", str(scan)]
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  if done.returncode:
    raise SystemExit(done.stdout[-4000:])
  return float(done.stdout.split()[-1])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", default="v5p-16", help="as MaxText's compile_topology")
  parser.add_argument("--layers", type=int, default=20, help="of the model; ling2 has 20")
  parser.add_argument("--layout", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.layout:
    print(seconds(options.layout == "True", options.topology, options.layers))
    return
  title = f"ling2, {options.layers} layers, {options.topology}"
  scanned = measure(True, options.topology, options.layers)
  print(f"{title}, scan_layers=true:  {scanned:6.1f} s", flush=True)
  unscanned = measure(False, options.topology, options.layers)
  print(f"{title}, scan_layers=false: {unscanned:6.1f} s")
  print(f"scanned / unscanned: {scanned / unscanned:.2f}")


if __name__ == "__main__":
  main()
