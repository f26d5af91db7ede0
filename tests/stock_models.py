"""Prints digests of what stock models are and compute here: stock_models.py FIELDS [MODEL ...] (test_stock.py).

For a dense model, a DeepSeek mixture of experts and Qwen3-Next, at tiny sizes: the config, the parameter tree, forward
logits and one optimizer step.
"""

import hashlib
import json
import os
import sys

import numpy as np

COMMON = {
  "run_name": "stock", "base_output_directory": "maxtext_output", "enable_checkpointing": False, "log_config": False,
  "enable_goodput_recording": False, "skip_jax_distributed_system": True, "dataset_type": "synthetic", "steps": 2,
  "override_model_config": True, "attention": "dot_product", "megablox": False, "vocab_size": 64, "base_emb_dim": 32,
  "base_mlp_dim": 32, "head_dim": 8, "base_num_query_heads": 4, "base_num_kv_heads": 4, "max_target_length": 16,
  "per_device_batch_size": 2, "learning_rate": 1e-2, "tokenizer_path": "none",
}  # fmt: skip
EXPERTS = {"base_moe_mlp_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MODELS = {
  "llama2-7b": {"base_num_decoder_layers": 2},
  "deepseek3-tiny": {
    "base_num_decoder_layers": 3, "first_num_dense_layers": 1, "routed_bias_update_rate": 0.01, "mtp_num_layers": 1,
    "shared_experts": 1, **EXPERTS, **MLA,
  },
  "qwen3-next-80b-a3b": {
    "base_num_decoder_layers": 4, "gdn_key_head_dim": 8, "gdn_value_head_dim": 8, "gdn_num_key_heads": 2,
    "gdn_num_value_heads": 4, "gdn_chunk_size": 8, "base_num_kv_heads": 2, **EXPERTS,
  },
}  # fmt: skip


def digest(value):
  return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()[:16]


def arrays(state):
  import jax
  from flax import nnx

  flat = sorted(nnx.to_flat_state(state), key=lambda item: str(item[0]))
  values = [(path, v.get_value()) for path, v in flat]
  return [
    (path, np.asarray(jax.random.key_data(v) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else v))
    for path, v in values
  ]


def look(name, settings, ours):
  import jax
  from flax import nnx
  from flax.core.spmd import logical_axis_rules
  from maxtext.common import train_state_nnx
  from maxtext.configs import pyconfig
  from maxtext.models import models
  from maxtext.trainers.pre_train import train
  from maxtext.utils import maxtext_utils, train_utils

  base = os.path.join(pyconfig.MAXTEXT_CONFIGS_DIR, "base.yml")
  config = pyconfig.initialize(["", base], model_name=name, **{**COMMON, **settings})
  keys = {key: value for key, value in config.get_keys().items() if key not in ours}
  mesh = maxtext_utils.get_mesh_from_config(config)
  with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
    model = models.Transformer(config, mesh, quant=None, rngs=nnx.Rngs(params=0, dropout=1))
    _, optimizer = train_utils.create_training_optimizer(config, model, mesh=mesh)
    graph, state = nnx.split(train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)))
    tree = [(path, value.shape, str(value.dtype)) for path, value in arrays(state)]
    ids = np.arange(32, dtype=np.int32).reshape(2, 16)
    positions, ones = np.arange(16, dtype=np.int32)[None].repeat(2, 0), np.ones((2, 16), np.int32)
    data = {"inputs": ids, "targets": ids + 1}
    data |= {
      f"{k}_{what}": v for k in ("inputs", "targets") for what, v in (("position", positions), ("segmentation", ones))
    }
    shardings = jax.tree.map(
      lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), nnx.state(model, nnx.Param)
    )
    step, *_ = maxtext_utils.get_functional_train_with_signature(train.train_step, None, None, graph, config, shardings)
    graph_model, model_state = nnx.split(model)
    call = jax.jit(lambda s: nnx.merge(graph_model, s, copy=True)(ids, positions, ones, enable_dropout=False))
    logits = np.asarray(call(model_state).astype("float32"))
    after, metrics = jax.jit(step)(state, data)
  return {
    "config": digest(sorted((key, str(value)) for key, value in keys.items())),
    "tree": digest(tree),
    "logits": digest(logits.tobytes()),
    "loss": float(metrics["scalar"]["learning/loss"]),
    "step": digest(b"".join(value.tobytes() for _, value in arrays(after))),
    "flops": maxtext_utils.calculate_tflops_training_per_device(config, log=False),
    "finite": bool(np.all(np.isfinite(logits))),
  }


def main():
  ours, names = set(sys.argv[1].split(",")), sys.argv[2:]
  result = {name: look(name, MODELS[name], ours) for name in names or MODELS}
  result["plugin"] = "maxtext_ling2" in sys.modules
  print("RESULT " + json.dumps(result))


if __name__ == "__main__":
  main()
