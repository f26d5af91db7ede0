"""The operation count: against published active parameters, against XLA's own count, and where MaxText asks for it."""

import types

import numpy as np
import pytest

from maxtext_ling2.maxtext_api import session
from maxtext_ling2.ops.gla import block_sizes, chunk_size
from maxtext_ling2.training.flops import forward_flops, gla_layer, training_tflops_per_device
from tiny import config, model

SHAPES = {  # spec: name, layers, C, H, F, M, shared, q rank, cycle, dense, V, active parameters
  "ling2": (20, 2048, 16, 5120, 512, 2048, 256, 5, 1, 1.77e9),
  "ling2.6-flash": (32, 4096, 32, 9216, 1024, 1024, 1536, 8, 1, 7.45e9),
  "ling2.5-1t": (80, 8192, 64, 18432, 2048, 2048, 1536, 8, 4, 63.6e9),
}
VOCABULARY = 157184


def published(name):
  layers, embed, heads, dense, expert, shared, rank, cycle, first, _ = SHAPES[name]
  return types.SimpleNamespace(
    num_decoder_layers=layers, emb_dim=embed, num_query_heads=heads, head_dim=128, mlp_dim=dense, moe_mlp_dim=expert,
    moe_shared_expert_dim=shared, shared_experts=1, q_lora_rank=rank, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, inhomogeneous_layer_cycle_interval=cycle, first_num_dense_layers=first,
    num_experts=256, num_experts_per_tok=8, vocab_size=VOCABULARY, mtp_num_layers=0, max_target_length=4096,
    per_device_batch_size=1, gradient_accumulation_steps=1, use_dpo=False,
  )  # fmt: skip


@pytest.mark.unit
@pytest.mark.parametrize("name", SHAPES)
def test_active_parameters(name):
  """Two operations a parameter, and the embedding table, which is looked up."""
  c = published(name)
  active = forward_flops(c).weights / 2 + VOCABULARY * c.emb_dim
  assert active == pytest.approx(SHAPES[name][-1], rel=0.005)


@pytest.mark.unit
def test_ling2_by_hand():
  c = published("ling2")
  forward = forward_flops(c)
  assert forward.gla == 16 * 16 * (2 * 128 * 128 + 2 * 128 * 128)  # 16 layers, 16 heads: k v^T and q S
  assert forward.mla == 4 * 16 * (128 + 64 + 128) * 4096
  total, weights, attention = training_tflops_per_device(c)
  assert total == pytest.approx(weights + attention)
  assert weights == pytest.approx(3 * forward.weights * 4096 / 1e12)


def test_the_count_does_not_depend_on_chip_or_chunk(monkeypatch):
  """Chunks of the GLA kernels are 128, 256 or 512 tokens, by the device; the model's operations are the same."""
  c = published("ling2")
  counts, chunks = set(), set()
  for kind in ("cpu", "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "NVIDIA H200"):
    monkeypatch.setattr(block_sizes, "device_kind", lambda kind=kind: kind)
    chunks.add(chunk_size(4096))
    counts.add(training_tflops_per_device(c))
  assert chunks == {128, 256, 512}
  assert len(counts) == 1


def test_the_recurrence_is_what_its_products_take():
  """XLA counts one token of one head as the formula does: k v^T added to the state, and q S."""
  import jax
  import jax.numpy as jnp

  def step(state, q, k, v):
    state = state + jnp.einsum("d,e->de", k, v)
    return jnp.einsum("d,de->e", q, state)

  D = 128
  vector = jax.ShapeDtypeStruct((D,), jnp.float32)
  matrix = jax.ShapeDtypeStruct((D, D), jnp.float32)
  counted = jax.jit(step).lower(matrix, vector, vector, vector).compile().cost_analysis()["flops"]
  layer = gla_layer(types.SimpleNamespace(emb_dim=1, num_query_heads=1, head_dim=D))
  assert counted == layer.gla


@pytest.mark.unit
def test_linear_attention_is_linear_and_softmax_attention_quadratic_in_length():
  c = published("ling2")
  short = forward_flops(c)
  c.max_target_length *= 2
  long = forward_flops(c)
  assert long.gla == short.gla and long.weights == short.weights and long.mla == 2 * short.mla


@pytest.mark.unit
def test_mtp_adds_projection_layer_and_head():
  c = published("ling2")
  without = forward_flops(c).weights
  c.mtp_num_layers = 1
  added = (forward_flops(c).weights - without) / 2
  # 0.836 B parameters (published) are 8 + 1 of 256 + 4 experts, with the head counted once more.
  inactive = 3 * 2048 * 512 * (256 - 8)
  assert added == pytest.approx(0.836e9 - inactive + VOCABULARY * 2048, rel=0.01)


def test_against_xla():
  """A model without dynamic parts: dense layers, one chunk. XLA counts MLA's whole square of scores, not half, and the
  scores within GLA's chunk.
  """
  import jax
  from flax import nnx

  cfg = config(
    base_num_decoder_layers=4, inhomogeneous_layer_cycle_interval=2, first_num_dense_layers=4, mtp_num_layers=0,
    base_emb_dim=256, head_dim=64, base_mlp_dim=512, vocab_size=512, max_target_length=128, q_lora_rank=128,
    kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, per_device_batch_size=2,
    remat_policy="none",
  )  # fmt: skip
  network, mesh = model(cfg)
  graph, state = nnx.split(network)
  ids = np.ones((2, 128), np.int32)

  def run(state):
    return nnx.merge(graph, state, copy=True)(ids, ids, None, enable_dropout=False)

  with session.model_context(cfg, mesh):
    counted = jax.jit(run).lower(state).compile().cost_analysis()["flops"]
  forward = forward_flops(cfg)
  within_chunk = 2 * cfg.num_query_heads * 4 * chunk_size(128) * 64  # two GLA layers
  assert counted == pytest.approx((forward.weights + forward.gla + within_chunk + 2 * forward.mla) * 256, rel=0.03)


def test_maxtext_asks_us():
  from maxtext.utils import maxtext_utils

  cfg = config()
  assert maxtext_utils.calculate_tflops_training_per_device(cfg, log=False) == training_tflops_per_device(cfg)
