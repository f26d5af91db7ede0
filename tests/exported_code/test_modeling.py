"""The exported PyTorch code against the recorded outputs of the official code, and against closed forms."""
# ruff: noqa: E402  what follows importorskip needs what it asks for

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch.nn.functional as F
from exported_model import (
  CASES,
  GOLDEN,
  attention,
  configuration,
  golden,
  largest_error,
  modeling,
  recorded,
  reference,
  tiny,
  tokens,
)

LENGTHS = ("short", "long")
OFFSETS = {1: "eval", 0: "slope_noshift"}
"""gla_decay_layer_offset -> the recording it makes."""


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss(case, length, offset):
  io = recorded(case, f"io_{length}")
  with torch.no_grad():
    output = golden(case, offset)(io["input_ids"], labels=io["labels"])
  assert output.logits.dtype == torch.float32
  assert largest_error(output.logits, io[f"{OFFSETS[offset]}.logits"]) < 2e-5  # logits of size 4
  assert abs(output.loss.item() - io[f"{OFFSETS[offset]}.loss"].item()) < 1e-5


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_hidden_states_of_all_layers(case, length):
  io, model = recorded(case, f"io_{length}"), golden(case, 1)
  with torch.no_grad():
    states = model(io["input_ids"], output_hidden_states=True).hidden_states
  assert len(states) == model.config.num_hidden_layers + 1
  for state, theirs in zip(states, io["eval.hidden_states"], strict=True):
    assert largest_error(state, theirs) < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_padding_on_the_right(case):
  io = recorded(case, "io_short")
  mask = io["pad.attention_mask"]
  with torch.no_grad():
    output = golden(case, 1)(io["pad.input_ids"], attention_mask=mask, labels=io["pad.labels"])
  assert largest_error(output.logits[mask == 1], io["pad.logits"][mask == 1]) < 2e-5
  assert abs(output.loss.item() - io["pad.loss"].item()) < 1e-5


@pytest.mark.parametrize("document", range(3))
@pytest.mark.parametrize("case", CASES)
def test_documents_alone(case, document):
  io = recorded(case, "io_short")
  with torch.no_grad():
    logits = golden(case, 1)(io[f"pack.doc{document}.ids"]).logits
  assert largest_error(logits, io[f"pack.doc{document}.logits"]) < 2e-5


@pytest.mark.parametrize(("case", "kind"), [("one_cycle", "b1"), ("one_cycle", "noshift"), ("trailing_mtp", "b1")])
def test_gradients(case, kind):
  model = golden(case, 0 if kind == "noshift" else 1).train()
  io, theirs = recorded(case, "io_short"), recorded(case, f"grads_{kind}_short")
  rows = slice(1) if kind == "b1" else slice(None)
  model.zero_grad()
  try:
    output = model(io["input_ids"][rows], labels=io["labels"][rows])
  finally:
    model.eval()
  output.loss.backward()
  if kind == "b1":
    assert abs(output.loss.item() - io["b1.train.loss"].item()) < 1e-5
  ours = {name: parameter.grad for name, parameter in model.named_parameters()}
  assert ours.keys() == theirs.keys()
  for name, gradient in ours.items():
    their = theirs[name]
    if name == "model.word_embeddings.weight":  # the official code gives the padding token's row no gradient
      gradient, their = gradient[1:], their[1:]
    torch.testing.assert_close(gradient, their, rtol=1e-3, atol=max(1e-5 * their.abs().max().item(), 1e-12), msg=name)


def test_mtp():
  model, io = golden("trailing_mtp", 1).train(), recorded("trailing_mtp", "io_short")
  try:
    with torch.no_grad():
      both = model(io["input_ids"], labels=io["labels"])
      one = model(io["input_ids"][:1], labels=io["labels"][:1])
  finally:
    model.eval()
  assert largest_error(both.mtp_logits[0], io["train.mtp_logits"]) < 2e-5
  assert abs(both.mtp_loss.item() - io["mtp_loss_per_row_correct"].item()) < 1e-5
  assert abs(one.mtp_loss.item() - io["b1.train.mtp_loss_hf"].item()) < 1e-5
  main = F.cross_entropy(one.logits[0, :-1], io["labels"][0, 1:])
  assert abs(one.loss.item() - (main + 0.1 * one.mtp_loss).item()) < 1e-6


def test_mtp_is_for_training_only_and_costs_nothing_with_weight_0():
  ids = tokens(2, 9)
  model = tiny(num_nextn_predict_layers=1)
  assert model(ids, labels=ids).mtp_loss is None
  assert model.train()(ids, labels=ids).mtp_loss is not None
  assert model.train()(ids).mtp_loss is None
  model = tiny(num_nextn_predict_layers=1, mtp_loss_scaling_factor=0.0).train()
  assert model(ids, labels=ids).mtp_loss is None


def test_loss_over_a_count_that_the_trainer_gives():
  ids, model = tokens(2, 9), tiny()
  labels = ids.clone()
  labels[0, 4:7] = -100
  mean = model(ids, labels=labels).loss
  assert abs(model(ids, labels=labels, num_items_in_batch=26).loss.item() - mean.item() * 13 / 26) < 1e-6
  assert model(ids, labels=torch.full_like(ids, -100)).loss.item() == 0.0  # nothing is scored: no NaN


@pytest.mark.parametrize("case", CASES)
def test_decay_of_each_layer(case):
  with np.load(GOLDEN / "gla_decay.npz") as file:
    for key in (key for key in file.files if key.startswith(case)):
      offset, layer = 0 if "noshift" in key else 1, int(key.rpartition("layer")[2])
      ours = golden(case, offset).model.layers[layer].attention.g_gamma
      np.testing.assert_allclose(ours, file[key], rtol=1e-6)


def test_decay_where_heads_are_no_power_of_two():
  config = tiny(num_attention_heads=6, num_hidden_layers=4).config
  slopes = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]  # ALiBi's of 4 heads, and every other one of 8
  np.testing.assert_allclose(configuration.log_decays(config, 2), [-s * (1 - 2 / 3 + 1e-5) for s in slopes], rtol=1e-12)


VARIANTS = {
  "as it is": {},
  "queries without a latent": {"q_lora_rank": None},
  "q_lora_rank 0": {"q_lora_rank": 0},
  "no shared experts": {"num_shared_experts": None},
  "0 shared experts": {"num_shared_experts": 0},
  "3 shared experts": {"num_shared_experts": 3},
  "one expert a token": {"num_experts_per_tok": 1},
  "one group": {"n_group": 1, "topk_group": 1},
  "all experts": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8},
  "SiLU": {"linear_silu": True},
  "no norm of queries and keys": {"use_qk_norm": False},
  "one group of the output's norm": {"group_norm_size": 1},
  "another epsilon, which the latents' norms do not follow": {"rms_norm_eps": 0.1},
  "values wider than keys": {"v_head_dim": 24},
  "6 heads": {"num_attention_heads": 6},
  "offset 1": {"gla_decay_layer_offset": 1},
  "trailing layers": {"num_hidden_layers": 5, "layer_group_size": 3},
  "MLA only": {"layer_group_size": 1},
  "GLA at the end": {"num_hidden_layers": 3, "layer_group_size": 3},
  "no dense layer": {"first_k_dense_replace": 0},
  "dense only": {"first_k_dense_replace": 4},
  "MTP": {"num_nextn_predict_layers": 1},
  "two layers of MTP": {"num_nextn_predict_layers": 2},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_against_the_one_page_model(changes):
  """The model of examples/torch_ling2.py takes other ways: all experts see all tokens, attention is one sum."""
  model = tiny(**changes).train()
  weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  theirs = reference.Ling2(model.config.to_dict(), weights, model.config.gla_decay_layer_offset)
  ids = tokens(2, 23)
  output, expected = model(ids, labels=ids), theirs(ids)
  assert largest_error(output.logits, expected.logits) < 1e-5 * expected.logits.abs().max()
  layers = model.config.num_nextn_predict_layers
  assert len(output.mtp_logits or ()) == len(expected.mtp_logits) == layers
  for ours, their in zip(output.mtp_logits or (), expected.mtp_logits, strict=True):
    assert largest_error(ours, their) < 1e-5 * their.abs().max()
  parts = [F.cross_entropy(x[:, :-k].flatten(0, 1), ids[:, k:].flatten()) for k, x in enumerate(expected.mtp_logits, 2)]
  main = F.cross_entropy(expected.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
  assert abs(output.loss.item() - (main + 0.1 * sum(parts) / max(layers, 1)).item()) < 1e-5


def test_groups_of_one_expert():
  """The best 3 of the best 5 groups are the best 3 experts."""
  ids = tokens(2, 9)
  assert torch.equal(tiny(n_group=8, topk_group=5)(ids).logits, tiny(n_group=1, topk_group=1)(ids).logits)


def recurrence(q, k, v, g_gamma, is_token):
  """GLA one token a step, in float64."""
  q, k, v, decay = q.double(), k.double(), v.double(), g_gamma.double().exp()[:, None, None]
  state, outputs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=torch.float64), []
  for t in range(q.shape[1]):
    new = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
    state = torch.where(is_token[:, t, None, None, None], new, state)
    outputs.append(q.shape[-1] ** -0.5 * torch.einsum("bhd,bhde->bhe", q[:, t], state))
  return torch.stack(outputs, 1), state


@pytest.mark.parametrize("decays", [(-1e-5, -0.3), (-0.96, -2.0)])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 200])
def test_linear_attention_in_chunks(length, decays):
  generator = torch.Generator().manual_seed(length)
  q, k, v = (torch.randn(2, length, 2, 8, generator=generator) for _ in range(3))
  is_token = torch.rand(2, length, generator=generator) > 0.3
  g_gamma = torch.tensor(decays)
  for mask in (None, is_token):
    o, state = attention.gated_linear_attention(q, k, v, g_gamma, mask, None)
    seen = torch.ones_like(is_token) if mask is None else mask
    expected, last = recurrence(q, k, v, g_gamma, seen)
    assert largest_error(o[seen], expected[seen]) < 2e-5 and o.isfinite().all()
    assert largest_error(state, last) < 2e-5 and state.dtype == torch.float32
    cut = length // 3  # goes on from the state of an earlier call
    parts = [None if mask is None else mask[:, s] for s in (slice(cut), slice(cut, None))]
    middle = (
      attention.gated_linear_attention(q[:, :cut], k[:, :cut], v[:, :cut], g_gamma, parts[0], None)[1] if cut else None
    )
    rest, end = attention.gated_linear_attention(q[:, cut:], k[:, cut:], v[:, cut:], g_gamma, parts[1], middle)
    assert largest_error(rest[seen[:, cut:]], expected[:, cut:][seen[:, cut:]]) < 2e-5
    assert largest_error(end, last) < 2e-5


def test_experts_are_a_weighted_sum():
  moe = tiny(num_shared_experts=2).model.layers[1].mlp
  x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
  chosen, weights = moe.gate(x.flatten(0, 1))
  assert chosen.shape == (10, 3) and weights.dtype == torch.float32
  np.testing.assert_allclose(weights.sum(-1).detach(), 2.5, rtol=1e-6)
  expected = torch.stack(
    [
      sum(weight * moe.experts[e](token) for e, weight in zip(row.tolist(), ws, strict=True)) + moe.shared_experts(token)
      for token, row, ws in zip(x.flatten(0, 1), chosen, weights, strict=True)
    ]
  )
  assert largest_error(moe(x).flatten(0, 1), expected) < 1e-5
  assert largest_error(moe.train()(x).flatten(0, 1), expected) < 1e-5


def test_all_tokens_to_the_same_experts_and_one_token_alone():
  moe = tiny().model.layers[1].mlp
  with torch.no_grad():
    moe.gate.expert_bias.copy_(torch.tensor([5.0, 5, 5, 0, 0, 0, 0, 0]))
  x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
  assert moe.gate(x[0])[0].sort(-1).values.tolist() == [[0, 1, 2]] * 7
  assert largest_error(moe(x)[:, 3:4], moe(x[:, 3:4])) < 1e-6
  moe.train()(x).sum().backward()
  used = [expert.down_proj.weight.grad.abs().sum() > 0 for expert in moe.experts]
  assert used == [True] * 3 + [False] * 5  # zero, not absent: all processes of a sharded run take part in all experts


def test_router_and_state_are_float32_under_autocast():
  model = tiny()
  router, x = model.model.layers[1].mlp.gate, torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
  chosen, weights = router(x)
  with torch.autocast("cpu", torch.bfloat16):
    chosen_there, weights_there = router(x)
    generous = model(tokens(1, 8), use_cache=True)
  assert torch.equal(chosen, chosen_there) and torch.equal(weights, weights_there)
  assert generous[modeling._CACHE].layers[0].state.dtype == torch.float32


def test_bfloat16():
  """All experts take part, so that none is chosen otherwise for a rounding error."""
  model = tiny(n_group=1, topk_group=1, num_experts_per_tok=8)
  biases = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("expert_bias")}
  ids = tokens(2, 70)
  with torch.no_grad():
    exact = model(ids).logits
    model.to(torch.bfloat16)
    rounded = model(ids).logits
  assert rounded.dtype == torch.float32 and model.lm_head.weight.dtype == torch.bfloat16
  assert largest_error(rounded, exact) < 0.05 * exact.abs().max()
  for name, value in model.state_dict().items():
    if name in biases:
      assert value.dtype == torch.float32 and torch.equal(value, biases[name])
  assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 74)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
  ids = tokens(2, 70)
  gradients = []
  for checkpointed in (False, True):
    model = tiny(num_nextn_predict_layers=1).train()
    if checkpointed:
      model.gradient_checkpointing_enable({"use_reentrant": reentrant})
      model.enable_input_require_grads()
    output = model(ids, labels=ids, use_cache=checkpointed)
    assert output.get(modeling._CACHE) is None  # recomputing a layer would put its tokens there twice
    output.loss.backward()
    gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
  for name, gradient in gradients[0].items():
    torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_lora_by_peft():
  peft = pytest.importorskip("peft")
  model = tiny(num_nextn_predict_layers=1)
  targets = ["query_key_value", "g_proj", "q_b_proj", "kv_b_proj", "dense"]
  model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)).train()
  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
  ids, seen = tokens(2, 20), []
  for _ in range(8):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seen.append(loss.item())
  assert seen[1] < seen[0] and seen[-1] < seen[0] - 0.1
  assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} == set(targets)
  merged = model.eval().merge_and_unload()
  assert math.isfinite(merged(ids).logits.sum().item())


def test_what_would_be_ignored_is_refused():
  model, ids = tiny(), tokens(1, 4)
  with pytest.raises(ValueError, match="attention weights"):
    model(ids, output_attentions=True)
  with pytest.raises(ValueError, match="several documents in one row"):
    model(ids, cu_seq_lens_q=torch.tensor([0, 2, 4]))
  with pytest.raises(ValueError, match=r"attention_mask is \[1, 3\]"):
    model(ids, attention_mask=torch.ones(1, 3))
  with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
    model()
