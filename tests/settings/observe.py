"""Which settings of MaxText LING2 runs read, and where: noted while tiny models are trained, evaluated and decoded.

`python observe.py FILE` writes {field: [module, ...]} as JSON. A process of its own: it takes minutes, and MaxText's
trainer changes the process it runs in.
"""

import collections
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ONE_CYCLE = {"base_num_decoder_layers": 3, "per_device_batch_size": 1}
SPARSE = {"sparse_matmul": True}
RING = {"sparse_matmul": True, "megablox": True, "use_ring_of_experts": True, "use_ragged_sort": True}
RING |= {"dtype": "bfloat16"}  # as MaxText's reference of the ragged kernels returns on CPUs
RING |= {"ragged_buffer_factor": 2.0, "ici_expert_parallelism": 8, "ici_fsdp_parallelism": 1}
FP8 = {"quantization": "fp8_full", "use_qwix_quantization": True}
YARN = {"rope_type": "yarn", "rope_factor": 4, "max_position_embeddings": 64, "original_max_position_embeddings": 16}
TRACED = {
  "plain": {},
  "scanned": {"scan_layers": True, "base_num_decoder_layers": 9, "remat_policy": "custom"},
  "grouped products": SPARSE | {"megablox": True, "moe_routing_maps": "device", "remat_policy": "custom"},
  "experts on devices": SPARSE | {"ici_expert_parallelism": 8},
  "ring": RING | {"num_moe_token_chunks": 2, "defer_small_all_reduces": True, "eval_ragged_buffer_factor": 2.0},
  "ring that falls back": RING | {"moe_dropless_fallback": "layer", "moe_topk_before_ep_all_gather": True},
  "context": {"ici_context_parallelism": 2, "context_parallel_load_balance": False},
  "fp8": FP8 | {"quantize_mtp": True, "quantize_logits_proj": True, "weight_sparsity_n": 2, "weight_sparsity_m": 4},
  "int8": {"quantization": "int8"},
  "losses": {"sparse_matmul": False, "capacity_factor": 8.0, "load_balance_loss_weight": 0.01, "z_loss_multiplier": 1e-3},
  "logits in tiles": {"num_vocab_tiling": 4},
  "accumulation": {"gradient_accumulation_steps": 2, "enable_dropout": True, "dropout_rate": 0.1},
  "watched": {"record_internal_nn_metrics": 1, "log_step_diagnostics": True, "skip_step_on_spikes": True},
  "muon": {"opt_type": "muon", "use_qk_clip": True},
  "yarn": YARN,
}
"""Runs that are traced only, each with what makes it read more than the others."""
RULE = "maxtext_ling2.configs.experts"
"""Reads all settings of MaxText's own path through the experts only to see that nobody has set them."""


def trace(settings):
  """Traces the train and the eval step."""
  import jax

  import tiny

  run = tiny.Run(**{**ONE_CYCLE, **settings})
  data = tiny.batch(run.config)
  with run.context():
    jax.eval_shape(run.step_function, run.state, data)
    jax.eval_shape(run.evaluate_function, run.state, data)


def decode():
  """A prompt and one token after it."""
  import tiny
  from maxtext_ling2.maxtext_api.engine import Engine

  cfg = tiny.config(**ONE_CYCLE, max_prefill_predict_length=8, ici_data_parallelism=8, ici_fsdp_parallelism=1)
  engine = Engine(cfg, tiny.weights(cfg))
  token, _ = engine.prefill([1, 2, 3], 0)
  engine.step({0: token})


def train():
  """Two steps of MaxText's trainer on Megatron data, with checkpoints, and one more from the last of them."""
  from absl import flags
  from maxtext.trainers.pre_train import train as trainer

  from training import stock_runs

  flags.FLAGS(["observe"])
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    documents = stock_runs.write_documents(folder)
    for steps in (2, 3):
      trainer.main(["train", *stock_runs.arguments(folder, "run", "run", steps, **documents, **ONE_CYCLE)])


def observe():
  """{field: sorted names of the modules that read it}."""
  from checkpoint.setting_cases import Reads

  with Reads() as reads:
    for name, settings in TRACED.items():
      print(name, file=sys.stderr, flush=True)
      trace(settings)
    decode()
    train()
  found = collections.defaultdict(set)
  for field, file, _ in reads.sites:
    if (reader := module(file)) != RULE:
      found[field].add(reader)
  return {field: sorted(modules) for field, modules in sorted(found.items())}


def module(file):
  """A file of MaxText's or ours as the name of a module, maxtext.layers.moe; of tests and others the file's name."""
  parts = Path(file).with_suffix("").parts
  for package in ("maxtext", "maxtext_ling2"):
    if package in parts:
      return ".".join(parts[len(parts) - parts[::-1].index(package) - 1 :])
  return parts[-1]


if __name__ == "__main__":
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
  import conftest  # noqa: F401  the environment of all tests

  Path(sys.argv[1]).write_text(json.dumps(observe()))
