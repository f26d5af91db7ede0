"""Block sizes for each TPU generation: the table of maxtext_ling2/ops/gla/block_sizes.py, made by counting cycles.

    python benchmarks/gla_block_sizes.py --chip v6e

For each block: microseconds of the forward kernel that saves states, and of the backward kernel (T = 4096, 16 heads,
D = 128, bfloat16): those of the schedule, and those of the bytes; a kernel takes the longer of the two.
Both must use one chunk; among blocks within 1 % of the best, the one with fewer tokens per step packs documents better.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks.tpu_static import CHIPS, Job, NotEstimated, estimate

BLOCKS = [
  (chunk, tokens // chunk, heads) for chunk, tokens, heads in itertools.product((128, 256), (512, 1024, 2048), (2, 4, 8))
]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--chip", choices=CHIPS, required=True)
  chip = parser.parse_args().chip
  kernels = {"forward": {"save": True}, "backward": {}}
  cases = [(block, name) for block in BLOCKS for name in kernels]
  jobs: list[Job] = [
    (f"benchmarks.gla_cases:{name}", {"length": 4096, "heads": 16, "block": block, **kernels[name]})
    for block, name in cases
  ]
  print("kernel    chunk chunks heads  schedule      HBM  microseconds")
  for ((chunk, chunks, heads), name), result in zip(cases, estimate(chip, jobs), strict=True):
    if isinstance(result, NotEstimated):
      print(f"{name:9} {chunk:5} {chunks:6} {heads:5}  does not compile")
      continue
    (kernel,) = result.kernels
    print(f"{name:9} {chunk:5} {chunks:6} {heads:5}  {kernel.schedule_us:8.1f} {kernel.hbm_us:8.1f}")


if __name__ == "__main__":
  main()
