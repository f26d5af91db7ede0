"""Floors: all operations against MaxText's count of the model's, bytes and what is sent by hand."""

from types import SimpleNamespace

import pytest

from maxtext_ling2.plan.chips import CHIPS
from maxtext_ling2.plan.floor import Floor, Shares, floors, routed_rows
from maxtext_ling2.training.flops import training_tflops_per_device

pytestmark = pytest.mark.unit

LING2 = {
  "num_decoder_layers": 20,
  "inhomogeneous_layer_cycle_interval": 5,
  "first_num_dense_layers": 1,
  "mtp_num_layers": 1,
  "shared_experts": 1,
  "moe_shared_expert_dim": 2048,
  "moe_mlp_dim": 512,
  "emb_dim": 2048,
  "mlp_dim": 5120,
  "num_experts": 256,
  "num_experts_per_tok": 8,
  "vocab_size": 157184,
  "num_query_heads": 16,
  "head_dim": 128,
  "q_lora_rank": 256,
  "kv_lora_rank": 512,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "v_head_dim": 128,
  "max_target_length": 4096,
  "dtype": "bfloat16",
  "remat_policy": "full",
  "gradient_accumulation_steps": 1,
  "per_device_batch_size": 1,
  "global_batch_size_to_train_on": 32,
  "use_dpo": False,
}
EXPERTS = 20 * 256 * 3 * 2048 * 512  # weights of all routed experts, those of MTP's layer among them


def config(**changes):
  return SimpleNamespace(**{**LING2, **changes})


@pytest.mark.parametrize("changes", [{}, {"mtp_num_layers": 0, "num_decoder_layers": 10}])
@pytest.mark.parametrize("tensor", [1, 4])
def test_without_rematerialisation_the_operations_are_the_models(changes, tensor):
  found = floors(config(remat_policy="minimal", **changes), Shares(32, tensor=tensor))
  expected = training_tflops_per_device(config(**changes))[0] * 1e12
  assert sum(one.flops for one in found.values()) == pytest.approx(expected)


def test_rematerialised_forward_passes_count_but_for_the_logits():
  once, twice = (floors(config(remat_policy=policy), Shares(32)) for policy in ("minimal", "full"))
  for name in ("GLA", "MLA", "router"):
    assert twice[name].flops == pytest.approx(4 / 3 * once[name].flops)
  for name in ("experts", "shared expert", "dense MLP"):  # of three products two: none needs what the third one gives
    assert twice[name].flops == pytest.approx(11 / 9 * once[name].flops)
  assert twice["logits and loss"] == once["logits and loss"]


@pytest.mark.parametrize("expert", [1, 8])
def test_weights_of_the_experts(expert):
  """Read three times, down twice, and their gradient written; 1/32 is cast; tokens the same wherever experts are."""
  memory = floors(config(), Shares(32, expert))["experts"].memory
  weights = EXPERTS / expert * 2 * (4 - 1 / 3) + (2 - 1 / 3) * EXPERTS / 32 * 6
  rows = 20 * 4096 * ((3 * 8 + 1 + 8) * 4096 + (4 * 8 + 1) * 4096 + 4 * 8 * 512 * 2)
  assert memory == pytest.approx(weights + rows)


def test_what_is_sent():
  """FSDP: all weights gathered twice, gradients reduced; experts on 8 devices: 7 of 8 rows, five times per layer."""
  fsdp, shared = (floors(config(), Shares(32, expert))["collectives"] for expert in (1, 8))
  touched = fsdp.memory / 3
  assert fsdp.network_bytes == pytest.approx(3 * touched * 31 / 32)
  assert touched == pytest.approx(2 * EXPERTS, rel=0.08)  # the rest are 2 x the head, and what is no expert
  rows = 20 * 5 * 7 * 4096 * 4096
  assert shared.network_bytes == pytest.approx(3 * (touched - 2 * EXPERTS * 7 / 8) * 3 / 4 + rows)


@pytest.mark.parametrize(("ring", "copies"), [(True, 15), (False, 7.5)])
def test_a_ring_of_experts_sends_each_token_to_every_device(ring, copies):
  """Experts on 16 of 32 devices; without rematerialisation tokens go there and back, and the gradients of both."""
  sent = [
    floors(config(remat_policy="minimal", use_ring_of_experts=ring), Shares(32, expert))["collectives"].network_bytes
    for expert in (16, 1)
  ]
  touched = sent[1] / (2 * 31 / 32)
  assert sent[0] - 2 * (touched - 2 * EXPERTS * 15 / 16) / 2 == pytest.approx(20 * 4 * copies * 4096 * 4096)


def test_tensor_parallelism_sums_activations():
  """Twice per layer, forward, again and backward: an all-reduce among 4 sends 1.5 times the tokens of the group."""
  cut, whole = (floors(config(), Shares(32, tensor=tensor))["collectives"] for tensor in (4, 1))
  touched = whole.memory / 3
  assert cut.memory == pytest.approx(3 * touched / 4)
  sums = 21 * 2 * 3 * 1.5 * (4 * 4096) * 4096
  assert cut.network_bytes == pytest.approx(3 * touched / 4 * 7 / 8 + sums)


def test_devices_that_hold_the_same_weights_reduce_their_gradients():
  """32 devices as 4 x FSDP 8: gathered among 8, a gradient all-reduced among 4, AdamW on four times the shard."""
  replicas, whole = (floors(config(), Shares(32, data=data)) for data in (4, 1))
  touched = whole["collectives"].memory / 3
  assert replicas["collectives"].network_bytes == pytest.approx(3 * touched * 7 / 8 + 1.5 * touched / 8)
  update = "gradient norms, AdamW"
  assert replicas[update].memory == pytest.approx(4 * whole[update].memory)


def test_adamw_updates_every_weight_once():
  """Two moments and the weight read and written, the gradient read twice: 32 bytes; the head once, MTP or not."""
  gla, mla = 5 * 2048**2, 2048 * (256 + 576 + 16 * 128) + 256 * 16 * 192 + 512 * 16 * 256
  layers = 16 * gla + 5 * mla + 20 * 3 * 2048 * 2048 + 20 * 2048 * 256 + 3 * 2048 * 5120 + 2 * 2048**2
  weights = EXPERTS + layers + 2 * 2048 * 157184
  assert floors(config(), Shares(32))["gradient norms, AdamW"].memory == pytest.approx(32 * weights / 32)


def test_rows_that_are_routed():
  assert routed_rows(config(), Shares(32)) == 8 * 4096
  assert routed_rows(config(), Shares(32, expert=8)) == 8 * 4096
  assert routed_rows(config(), Shares(32, tensor=4)) == 4 * 8 * 4096
  assert routed_rows(config(gradient_accumulation_steps=2), Shares(32)) == 8 * 2048


def test_shares_of_a_config():
  """-1 is what the other axes leave of a slice's devices, or of the slices."""
  axes = {
    "ici_expert_parallelism": 4,
    "ici_tensor_parallelism": -1,
    "dcn_data_parallelism": -1,
    "dcn_expert_parallelism": 1,
  }
  lists = {"ici_parallelism": [4, -1, 2, 1], "dcn_parallelism": [-1, 1, 1, 1]}
  assert Shares.of(SimpleNamespace(**axes, **lists), 64, slices=2) == Shares(64, expert=4, tensor=4, data=2)


def test_the_longest_of_three_bounds_a_part():
  chip = CHIPS["v5p"]
  assert Floor(flops=459e12, memory=1.0).seconds(chip) == 1.0
  assert Floor(memory=2765e9, flops=1.0).seconds(chip) == 1.0
  assert Floor(network_bytes=600e9).seconds(chip) == 1.0
