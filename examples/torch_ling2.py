"""LING2 in plain PyTorch, float32, written from the model's equations: what `loss_parity.py` compares MaxText with.

    python examples/torch_ling2.py CASE.npz LOSSES.json

trains the model of a case that `loss_parity.py` wrote and writes the losses of all steps. It needs torch and numpy, and
nothing of MaxText or of this package, so that neither can agree with the other by sharing code. Every expert computes
every token, and linear attention is the sum over all earlier tokens: right and short, not fast.
"""

import dataclasses
import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LATENT_EPSILON = 1e-6
"""Of the norms of MLA's latents, whatever rms_norm_eps is."""


@dataclasses.dataclass
class Output:
  """What a forward pass gives.

  Attributes:
    logits: [B, T, V].
    mtp_logits: for each MTP layer [B, T, V].
    counts: tokens sent to each expert, [E] int64, by the name of the router's bias.
  """

  logits: Tensor
  mtp_logits: list[Tensor]
  counts: dict[str, Tensor]


class Ling2:
  """The model. Its weights are a plain dictionary: `parameters` by Hugging Face name, and the router `biases`.

  Args:
    config: a Hugging Face config.json of BailingMoeV2_5ForCausalLM.
    weights: by Hugging Face name; copied, in float32.
    decay_offset: 0 as Megatron counts layers in the decay of linear attention, 1 as Hugging Face does.
  """

  def __init__(self, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], decay_offset: int):
    if config.get("rope_scaling"):
      raise ValueError("rope_scaling is set, which this model does not compute; take a config without it")
    self.config, self.decay_offset = config, decay_offset
    tensors = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in weights.items()}
    self.biases = {name: value for name, value in tensors.items() if name.endswith("expert_bias")}
    self.parameters = {name: value.requires_grad_() for name, value in tensors.items() if name not in self.biases}

  def __call__(self, ids: Tensor) -> Output:
    """Runs all layers and MTP over one document a row, ids [B, T]."""
    c, counts = self.config, {}
    h = self._weight("model.word_embeddings")[ids]  # (B, T, C)
    for i in range(c["num_hidden_layers"]):
      h = self._layer(h, i, counts)
    h = self._norm(h, "model.norm")
    logits = self._linear(h, "lm_head")
    mtp_logits = []
    for i in range(c["num_hidden_layers"], c["num_hidden_layers"] + (c.get("num_nextn_predict_layers") or 0)):
      ids = shifted(ids)
      h = self._mtp(h, ids, i, counts)
      mtp_logits.append(self._linear(h, "lm_head"))
    return Output(logits, mtp_logits, counts)

  def _weight(self, name: str) -> Tensor:
    return self.parameters[f"{name}.weight"]

  def _linear(self, x: Tensor, name: str) -> Tensor:
    return F.linear(x, self._weight(name))

  def _norm(self, x: Tensor, name: str, epsilon: float | None = None) -> Tensor:
    epsilon = self.config["rms_norm_eps"] if epsilon is None else epsilon
    return normalised(x, epsilon) * self._weight(name)

  def _layer(self, h: Tensor, i: int, counts: dict[str, Tensor]) -> Tensor:
    c, name = self.config, f"model.layers.{i}"
    layers, cycle = c["num_hidden_layers"], c["layer_group_size"]
    is_mla = (i + 1) % cycle == 0 or i >= layers // cycle * cycle  # MTP's layers, from `layers` on, too
    x = self._norm(h, f"{name}.input_layernorm")
    h = h + (self._mla(x, f"{name}.attention") if is_mla else self._gla(x, f"{name}.attention", i))
    x = self._norm(h, f"{name}.post_attention_layernorm")
    if i < c["first_k_dense_replace"]:
      return h + self._swiglu(x, f"{name}.mlp")
    return h + self._experts(x, f"{name}.mlp", counts)

  def _mtp(self, hidden: Tensor, ids: Tensor, i: int, counts: dict[str, Tensor]) -> Tensor:
    """The normalised output (B, T, C) of MTP layer `i`; `hidden` is that of the layer before or of the model."""
    name = f"model.layers.{i}"
    embedded = self._norm(self._weight("model.word_embeddings")[ids], f"{name}.enorm")
    u = self._linear(torch.cat([embedded, self._norm(hidden, f"{name}.hnorm")], -1), f"{name}.eh_proj")
    return self._norm(self._layer(u, i, counts), f"{name}.final_layernorm")

  def _gla(self, x: Tensor, name: str, layer: int) -> Tensor:
    """Linear attention: o_t = D^-0.5 * sum over s <= t of decay^(t - s) (q_t . k_s) v_s, which is the recurrence."""
    c = self.config
    heads, dim = c["num_attention_heads"], c["head_dim"]
    qkv = self._linear(x, f"{name}.query_key_value")
    if c.get("linear_silu", c.get("use_linear_silu", False)):
      qkv = F.silu(qkv)
    q, k, v = qkv.unflatten(-1, (3, heads, dim)).unbind(2)  # (B, T, H, D)
    if c["use_qk_norm"]:
      q, k = self._norm(q, f"{name}.query_layernorm"), self._norm(k, f"{name}.key_layernorm")
    rotated = int(dim * c["partial_rotary_factor"])
    q, k = (torch.cat([rope(t[..., :rotated], c["rope_theta"]), t[..., rotated:]], -1) for t in (q, k))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * self._decay(x.shape[1], layer) * dim**-0.5
    o = torch.einsum("bhts,bshd->bthd", scores, v).flatten(2)  # (B, T, H * D)
    o = normalised(o.unflatten(-1, (c["group_norm_size"], -1)), c["rms_norm_eps"]).flatten(2)
    gate = torch.sigmoid(self._linear(x, f"{name}.g_proj"))
    return self._linear(o * self._weight(f"{name}.g_norm") * gate, f"{name}.dense")

  def _decay(self, length: int, layer: int) -> Tensor:
    """decay^(t - s) where s <= t, else 0: (H, T, T)."""
    depth = (layer - self.decay_offset) / (self.config["num_hidden_layers"] - 1)
    log_decay = -torch.tensor(slopes(self.config["num_attention_heads"])) * (1 - depth + 1e-5)  # (H) float32
    distance = torch.arange(length)[:, None] - torch.arange(length)
    powers = torch.exp(log_decay[:, None, None] * distance.clamp(min=0))
    return torch.where(distance >= 0, powers, 0.0)

  def _mla(self, x: Tensor, name: str) -> Tensor:
    """Causal softmax attention with low-rank queries, keys and values."""
    c = self.config
    heads, nope, rotated = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    if c.get("q_lora_rank"):
      latent = self._norm(self._linear(x, f"{name}.q_a_proj"), f"{name}.q_a_layernorm", LATENT_EPSILON)
      q = self._linear(latent, f"{name}.q_b_proj")
    else:
      q = self._linear(x, f"{name}.q_proj")
    q_nope, q_rope = q.unflatten(-1, (heads, -1)).split([nope, rotated], -1)
    latent, k_rope = self._linear(x, f"{name}.kv_a_proj_with_mqa").split([c["kv_lora_rank"], rotated], -1)
    latent = self._norm(latent, f"{name}.kv_a_layernorm", LATENT_EPSILON)
    kv = self._linear(latent, f"{name}.kv_b_proj").unflatten(-1, (heads, -1))
    k_nope, v = kv.split([nope, c["v_head_dim"]], -1)
    q_rope, k_rope = (rope(deinterleaved(t), c["rope_theta"]) for t in (q_rope, k_rope[:, :, None]))
    q = torch.cat([q_nope, q_rope], -1)  # (B, T, H, nope + rope)
    k = torch.cat([k_nope, k_rope.expand(-1, -1, heads, -1)], -1)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (nope + rotated) ** -0.5
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    weights = torch.softmax(scores.masked_fill(later, -torch.inf), -1)
    o = torch.einsum("bhts,bshd->bthd", weights, v)
    return self._linear(o.flatten(2), f"{name}.dense")

  def _swiglu(self, x: Tensor, name: str) -> Tensor:
    return self._linear(
      F.silu(self._linear(x, f"{name}.gate_proj")) * self._linear(x, f"{name}.up_proj"), f"{name}.down_proj"
    )

  def _experts(self, x: Tensor, name: str, counts: dict[str, Tensor]) -> Tensor:
    """Mixture of experts; adds the router's counts to `counts`."""
    c, flat = self.config, x.flatten(0, 1)  # (N, C)
    bias = f"{name}.gate.expert_bias"
    scores = torch.sigmoid(self._linear(flat, f"{name}.gate"))  # (N, E)
    chosen = self._chosen(scores.detach() + self.biases[bias])  # (N, k)
    counts[bias] = torch.bincount(chosen.flatten(), minlength=c["num_experts"])
    picked = scores.gather(1, chosen)
    if c["num_experts_per_tok"] > 1:
      picked = picked / (picked.sum(-1, keepdim=True) + 1e-20)
    weights = torch.zeros_like(scores).scatter(1, chosen, picked * c["routed_scaling_factor"])  # (N, E)
    gate, up, down = (self._stacked(name, kind) for kind in ("gate_proj", "up_proj", "down_proj"))
    hidden = F.silu(torch.einsum("nc,emc->nem", flat, gate)) * torch.einsum("nc,emc->nem", flat, up)
    y = torch.einsum("nem,ecm,ne->nc", hidden, down, weights).view_as(x)
    return y + self._swiglu(x, f"{name}.shared_experts") if c.get("num_shared_experts") else y

  def _chosen(self, biased: Tensor) -> Tensor:
    """The experts (N, k) of each token: the best of the best groups, by biased scores (N, E)."""
    c = self.config
    grouped = biased.unflatten(1, (c["n_group"], -1))  # (N, G, E / G)
    kept = grouped.topk(2, -1).values.sum(-1).topk(c["topk_group"], -1).indices
    allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, kept, True)
    masked = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
    return masked.topk(c["num_experts_per_tok"], -1).indices

  def _stacked(self, name: str, kind: str) -> Tensor:
    return torch.stack([self._weight(f"{name}.experts.{e}.{kind}") for e in range(self.config["num_experts"])])


def shifted(x: Tensor, fill: int = 0) -> Tensor:
  """x [B, T] one to the left, with `fill` in the last place."""
  return F.pad(x[:, 1:], (0, 1), value=fill)


def normalised(x: Tensor, epsilon: float) -> Tensor:
  """x over the root mean square of its last axis."""
  return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def deinterleaved(x: Tensor) -> Tensor:
  """The last axis with its even places first, then the odd ones."""
  return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def rope(x: Tensor, theta: float) -> Tensor:
  """Rotates pairs (j, j + d / 2) of x [B, T, H, d] by the token's position."""
  dim = x.shape[-1]
  frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
  angle = (torch.arange(x.shape[1])[:, None] * frequencies)[:, None]  # (T, 1, d / 2)
  cos, sin = angle.cos().float(), angle.sin().float()
  first, second = x.chunk(2, -1)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def slopes(heads: int) -> np.ndarray:
  """The slope of each head's decay, [H] float32."""

  def geometric(count: int) -> np.ndarray:
    ratio = 2.0 ** -(2.0 ** -(math.log2(count) - 3))
    return ratio ** np.arange(1, count + 1)

  power = 2 ** int(math.log2(heads))
  return np.concatenate([geometric(power), geometric(2 * power)[0::2][: heads - power]]).astype(np.float32)


def losses(output: Output, targets: Tensor) -> tuple[Tensor, Tensor]:
  """(loss, MTP loss before its weight) for targets [B, T], the token after each position; all of them count.

  MTP layer k predicts the target k further on, which the last k positions of a row do not have.
  """
  main = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
  mtp = []
  for logits in output.mtp_logits:
    targets = shifted(targets, fill=-100)
    mtp.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100))
  return main, torch.stack(mtp).mean() if mtp else torch.zeros(())


def learning_rate(step: int, s: Mapping[str, Any]) -> float:
  """Linear warm-up from 0, then half a cosine down to learning_rate_final_fraction of the peak."""
  peak, final = s["learning_rate"], s["learning_rate"] * s["learning_rate_final_fraction"]
  warmup = int(s["learning_rate_schedule_steps"] * s["warmup_steps_fraction"])
  if step < warmup:
    return peak * step / warmup
  done = (step - warmup) / (s["learning_rate_schedule_steps"] - warmup - 1)
  high = 0.5 * (math.cos(math.pi * done) + 1)
  return peak * high + final * (1 - high)


class AdamW:
  """AdamW with decoupled weight decay on every parameter, after clipping the gradients by their global norm.

  It works on all parameters as one vector [P]: they are many and small.
  """

  def __init__(self, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]):
    self.parameters, self.settings, self.step = list(parameters.values()), settings, 0
    self.first = self.second = torch.zeros(sum(p.numel() for p in self.parameters))

  @torch.no_grad()
  def update(self, gradients: Sequence[Tensor]) -> None:
    """Moves the parameters by their gradients."""
    s, rate = self.settings, learning_rate(self.step, self.settings)
    self.step += 1
    g, p = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (gradients, self.parameters))
    norm, limit = g.square().sum().sqrt(), s["gradient_clipping_threshold"]
    if norm >= limit:
      g = g * (limit / norm)
    self.first = s["adam_b1"] * self.first + (1 - s["adam_b1"]) * g
    self.second = s["adam_b2"] * self.second + (1 - s["adam_b2"]) * g.square()
    first, second = self.first / (1 - s["adam_b1"] ** self.step), self.second / (1 - s["adam_b2"] ** self.step)
    p -= rate * (first / (second.sqrt() + s["adam_eps"]) + s["adam_weight_decay"] * p)
    for parameter, part in zip(self.parameters, p.split([q.numel() for q in self.parameters]), strict=True):
      parameter.copy_(part.view_as(parameter))


def balance(biases: Mapping[str, Tensor], counts: Mapping[str, Tensor], rate: float) -> None:
  """Loss-free balancing: moves each router's bias towards the experts that got too few tokens, then recentres it."""
  for name, bias in biases.items():
    bias += rate * torch.sign(counts[name].float().mean() - counts[name])
    bias -= bias.mean()


def train(model: Ling2, tokens: Tensor, settings: Mapping[str, Any]) -> dict[str, list[float]]:
  """One optimizer step for each of `tokens` [S, B, T + 1].

  Returns:
    {"loss": of the next token, "mtp_loss": MTP's before its weight}, one number a step, from before the update.
  """
  optimizer = AdamW(model.parameters, settings)
  seen: dict[str, list[float]] = {"loss": [], "mtp_loss": []}
  for batch in tokens.long():
    output = model(batch[:, :-1])
    main, mtp = losses(output, batch[:, 1:])
    objective = main + settings["mtp_loss_scaling_factor"] * mtp
    optimizer.update(torch.autograd.grad(objective, optimizer.parameters))
    balance(model.biases, output.counts, settings["routed_bias_update_rate"])
    seen["loss"].append(main.item())
    seen["mtp_loss"].append(mtp.item())
  return seen


def nudged(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The weights, each one rounding error up or down: what float32 can tell apart, and no more."""
  random, nudged_weights = np.random.RandomState(0), {}
  for name, value in weights.items():
    towards = np.where(random.randint(0, 2, value.shape), np.inf, -np.inf).astype(np.float32)
    nudged_weights[name] = value if name.endswith("expert_bias") else np.nextafter(value, towards)
  return nudged_weights


def main(case: Path, target: Path) -> None:
  """Trains a case for each of its decay offsets, as it is and with nudged weights, and writes all losses."""
  torch.set_num_threads(1)  # more would wait for each other: the tensors are tiny
  with np.load(case) as file:
    arrays = dict(file)
  tokens, about = torch.from_numpy(arrays.pop("tokens")), json.loads(str(arrays.pop("about")))
  written: dict[str, Any] = {"versions": {"torch": torch.__version__, "python": platform.python_version()}}
  for key, weights in (("losses", arrays), ("nudged", nudged(arrays))):
    written[key] = {
      str(offset): train(Ling2(about["hf_config"], weights, offset), tokens, about["settings"])
      for offset in about["decay_offsets"]
    }
  target.write_text(json.dumps(written))


if __name__ == "__main__":
  main(Path(sys.argv[1]), Path(sys.argv[2]))
