"""How fast and in how much memory a checkpoint is converted: python benchmarks/convert.py --gigabytes 2.

Makes a Hugging Face folder of that size (bfloat16, random), then measures, each in a separate process:

  cp                copying the folder, synced to disk
  Orbax             MaxText's own save of the same arrays from memory, compressed as by default
  to MaxText        Hugging Face -> MaxText, uncompressed (our default) and compressed, unscanned and scanned
  to Hugging Face   MaxText -> Hugging Face

Speeds are the best of three runs in one process, and in brackets the first; imports are excluded, syncing is included.
Ratios are best to best, and in brackets first to first: memory that the system has not used for some seconds is slow to
allocate, also for `cp` (which therefore runs after a pause as long as the imports of the others).
Memory is RssAnon (without mapped files) above its value after the imports, sampled every 5 ms.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# 64 experts per layer with three kernels of 128 MiB each: the largest leaves, at any number of layers.
SHAPE = {
  "architectures": ["BailingMoeV2_5ForCausalLM"],
  "hidden_size": 2048,
  "intermediate_size": 2048,
  "vocab_size": 8192,
  "first_k_dense_replace": 1,
  "layer_group_size": 2,
  "rms_norm_eps": 1e-6,
  "num_attention_heads": 8,
  "head_dim": 128,
  "group_norm_size": 4,
  "use_qk_norm": True,
  "q_lora_rank": 256,
  "kv_lora_rank": 256,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "v_head_dim": 128,
  "num_experts": 64,
  "num_experts_per_tok": 4,
  "moe_intermediate_size": 512,
  "num_shared_experts": 1,
  "n_group": 8,
  "topk_group": 4,
  "routed_scaling_factor": 2.5,
  "partial_rotary_factor": 0.5,
  "max_position_embeddings": 4096,
  "rope_theta": 10000.0,
  "num_nextn_predict_layers": 0,
}
SHARD_BYTES = 2**30
PERIOD = 0.005
RUNS = 3
PAUSE = 20


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the model")
  parser.add_argument("--folder", type=Path, help="working folder; the default is a temporary folder")
  parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.worker:
    print(json.dumps(work(*arguments.worker)))
    return
  with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    benchmark(Path(folder), arguments.gigabytes)


def benchmark(folder: Path, gigabytes: float) -> None:
  hf = folder / "hf"
  run("make", hf, gigabytes)
  size = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
  print(f"{size / 1e9:.2f} GB, {len(list(hf.glob('*.safetensors')))} files")
  print(
    f"{'':36} {'MB/s':>6} {'(first)':>8} {'of cp':>12} {'of Orbax':>13} {'RssAnon MiB':>12} {'of the largest leaf':>20}"
  )
  table = Table(size, copied := copy(hf, folder / "copy"))
  table.show("cp", {"seconds": copied})
  saved = run("orbax", hf, folder / "orbax")
  table.orbax = saved["seconds"]
  table.show("Orbax from memory, compressed", saved)
  shutil.rmtree(folder / "orbax")
  for scan in (0, 1):
    layout = "scanned" if scan else "unscanned"
    for compress in (0, 1):
      title = f"to MaxText, {layout}, {'' if compress else 'un'}compressed"
      table.show(title, run("import", hf, folder / "mt", scan, compress))
      if not compress:
        table.show(f"to Hugging Face, {layout}", run("export", hf, folder / "mt" / "0", scan, folder / "back"))
        shutil.rmtree(folder / "back")
      shutil.rmtree(folder / "mt")


@dataclasses.dataclass
class Table:
  """Lines of the report.

  Attributes:
    size: bytes of the model.
    copied: seconds of each run of cp.
    orbax: seconds of each run of Orbax.
  """

  size: int
  copied: list[float]
  orbax: list[float] | None = None

  def show(self, title: str, found: dict[str, Any]) -> None:
    seconds = found["seconds"]
    speeds = f"{self.size / min(seconds) / 1e6:6.0f} {f'({self.size / seconds[0] / 1e6:.0f})':>8}"
    ratios = f"{_ratios(self.copied, seconds):>12} {_ratios(self.orbax, seconds) if self.orbax else '':>13}"
    memory = f"{found['anonymous'] / 2**20:12.0f} {found['anonymous'] / found['leaf']:20.2f}" if "leaf" in found else ""
    print(f"{title:36} {speeds} {ratios} {memory}", flush=True)


def _ratios(reference: list[float], seconds: list[float]) -> str:
  """Speed relative to a reference: best to best, (first to first)."""
  return f"{min(reference) / min(seconds):.0%} ({reference[0] / seconds[0]:.0%})"


def run(*words: Any) -> Any:
  """Runs a worker process and returns its measurements."""
  command = [sys.executable, __file__, "--worker", *map(str, words)]
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
  if done.returncode:
    raise SystemExit(done.stderr[-3000:])
  return json.loads(done.stdout.splitlines()[-1])


def copy(source: Path, target: Path) -> list[float]:
  """Seconds of `cp` and syncing; the source is in the page cache, as for all others."""
  time.sleep(PAUSE)
  seconds = repeated(lambda: subprocess.run(["cp", "-r", source, target], check=True), target)
  shutil.rmtree(target)
  return seconds


def work(kind: str, *words: str) -> Any:
  if kind == "make":
    return make(Path(words[0]), float(words[1]))
  if kind == "orbax":
    return orbax(Path(words[0]), Path(words[1]))
  if kind == "import":
    return to_maxtext(Path(words[0]), Path(words[1]), words[2] == "1", words[3] == "1")
  return to_hugging_face(Path(words[0]), Path(words[1]), words[2] == "1", Path(words[3]))


def make(folder: Path, gigabytes: float) -> Any:
  """Writes the Hugging Face folder: as many layers as the size asks for, at least four."""
  import numpy as np

  from maxtext_ling2.checkpoint import safetensors_file, stock_tables

  def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    return stock_tables.hf_shapes({**SHAPE, "num_hidden_layers": layers})

  layers = 4
  while sum(math.prod(shape) for shape in shapes(layers + 1).values()) * 2 <= gigabytes * 1e9:
    layers += 1
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": layers}))
  bf16, f32 = safetensors_file.DTYPES["BF16"], safetensors_file.DTYPES["F32"]
  files: list[list[Any]] = [[]]
  for name, shape in shapes(layers).items():
    if sum(math.prod(s) * d.itemsize for _, s, d in files[-1]) > SHARD_BYTES:
      files.append([])
    files[-1].append((name, shape, f32 if name.endswith("expert_bias") else bf16))
  noise = np.random.default_rng(0).standard_normal(2**22).astype(bf16)
  for i, tensors in enumerate(files):
    path = folder / f"model-{i + 1:05}-of-{len(files):05}.safetensors"
    with safetensors_file.create(path, tensors) as new:
      for tensor in new.values():
        tensor.array[...] = np.resize(noise, tensor.array.shape)
  os.sync()
  return layers


def orbax(folder: Path, target: Path) -> Any:
  from maxtext.checkpoint_conversion.utils import utils

  from maxtext_ling2.checkpoint import blocks, stacking
  from maxtext_ling2.checkpoint.hf_checkpoint import HfCheckpoint
  from maxtext_ling2.checkpoint.import_hf import nested
  from maxtext_ling2.checkpoint.stored_weights import ROOT

  leaves = stacking.leaves(config(folder, False))
  with HfCheckpoint(folder) as tensors:
    tree = nested({(*ROOT, *leaf.path): blocks.stack(leaf, tensors.__getitem__) for leaf in leaves})
  return {"seconds": repeated(lambda: utils.save_weights_to_checkpoint(str(target), tree, 1, True, True), target)}


def to_maxtext(folder: Path, target: Path, scan: bool, compress: bool) -> Any:
  import maxtext.checkpoint_conversion.to_maxtext  # noqa: F401  what a conversion imports
  from etils import epath
  from rich.console import Console

  from maxtext_ling2.checkpoint.import_hf import Import
  from maxtext_ling2.checkpoint.orbax_store import Storage

  with Memory() as memory:
    model = config(folder, scan)

    def convert() -> None:
      Import(folder, model, epath.Path(target / "0"), "bfloat16").run(Storage(compress=compress), Console(quiet=True))

    seconds = repeated(convert, target, memory)
  return {"seconds": seconds, "anonymous": memory.peak, "leaf": largest(model)}


def to_hugging_face(folder: Path, checkpoint: Path, scan: bool, target: Path) -> Any:
  import maxtext.checkpoint_conversion.to_maxtext  # noqa: F401
  from etils import epath
  from rich.console import Console

  from maxtext_ling2.checkpoint.export_hf import Export

  with Memory() as memory:
    model = config(folder, scan)

    def convert() -> None:
      Export(epath.Path(checkpoint), model).run(target, "bfloat16", None, Console(quiet=True))

    seconds = repeated(convert, target, memory)
  return {"seconds": seconds, "anonymous": memory.peak, "leaf": largest(model)}


def config(folder: Path, scan: bool) -> Any:
  from maxtext_ling2.verify.model import make_config

  return make_config(folder, 1, 128, scan_layers=scan)


def largest(model: Any) -> int:
  from maxtext_ling2.checkpoint import stacking

  return max(math.prod(leaf.shape) for leaf in stacking.leaves(model)) * 2


def repeated(action: Callable[[], Any], target: Path, memory: "Memory | None" = None) -> list[float]:
  """Seconds of each of `RUNS` runs of an action that writes `target`, including syncing."""
  seconds = []
  for _ in range(RUNS):
    shutil.rmtree(target, ignore_errors=True)
    started = time.perf_counter()
    action()
    sync(target)
    seconds.append(time.perf_counter() - started)
    if memory is not None:
      memory.stop()
  return seconds


def sync(target: Path) -> None:
  """Syncs everything below a folder."""
  subprocess.run(["sync", *(path for path in target.rglob("*") if path.is_file())], check=True)


class Memory:
  """The peak of RssAnon above its value at the start, in bytes."""

  def __enter__(self) -> "Memory":
    self.peak, self._first, self._over = 0, anonymous(), threading.Event()
    self._thread = threading.Thread(target=self._sample)
    self._thread.start()
    return self

  def _sample(self) -> None:
    while not self._over.wait(PERIOD):
      self.peak = max(self.peak, anonymous() - self._first)

  def __exit__(self, *exc: Any) -> None:
    self.stop()

  def stop(self) -> None:
    self._over.set()
    self._thread.join()


def anonymous() -> int:
  """RssAnon of this process in bytes."""
  line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
  return int(line.split()[1]) * 1024


if __name__ == "__main__":
  main()
