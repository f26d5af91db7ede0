"""Tokens a second of ling2-tiny after contexts of 128, 1024 and 8192 tokens, and the share of MLA, in one run.

    python benchmarks/decode.py

A step is MaxEngine's `generate` for one slot, on whatever device JAX finds, in float32; the contexts take turns and the
median counts. GLA reads a state of constant size; MLA reads a cache as long as the context. Their shares are the times
of one such attention alone, compiled by itself, times how many of them the model has, over the time of the whole step.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

CONTEXTS = (128, 1024, 8192)
ROUNDS = 40


def config(context: int) -> Any:
  from maxtext_ling2.maxtext_api import session

  sizes = {
    "model_name": "ling2-tiny",
    "per_device_batch_size": 1,
    "max_prefill_predict_length": context,
    "max_target_length": context + 2 * ROUNDS,
  }
  return session.make_config(**session.FLOAT32_SETTINGS, **sizes)


def decoding_step(cfg: Any) -> Callable[[], Any]:
  """A step of the whole model, after a prompt that fills the context."""
  from maxtext_ling2.maxtext_api.engine import Engine

  engine = Engine(cfg)
  prompt = [1 + i % (cfg.vocab_size - 1) for i in range(cfg.max_prefill_predict_length)]
  engine.prefill(prompt, 0)
  return engine.step


def attention_step(cfg: Any, mla: bool) -> Callable[[], Any]:
  """A step of one attention alone, on a full cache."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from maxtext_ling2.maxtext_api import session
  from maxtext_ling2.model.layer import Ling2DecoderLayer

  mesh, mode = session.make_mesh(cfg), "autoregressive"
  with session.model_context(cfg, mesh):
    layer = Ling2DecoderLayer(cfg, mesh, mode, nnx.Rngs(0), mla=mla, dense=True, layer_idx=0)
    graph, state = nnx.split(layer.self_attention)

  def run(state: Any, x: jax.Array, positions: jax.Array) -> Any:
    attention = nnx.merge(graph, state)
    segments = jnp.ones_like(positions)
    if mla:
      y = attention(x, x, positions, decoder_segment_ids=segments, deterministic=True, model_mode=mode)[0]
    else:
      y = attention(x, segments, positions, 0, mode)
    return y, nnx.state(attention)

  with session.model_context(cfg, mesh):
    x = jnp.ones((1, 1, cfg.emb_dim), cfg.dtype)
    compiled = jax.jit(run).lower(state, x, jnp.full((1, 1), cfg.max_prefill_predict_length)).compile()
  return lambda: jax.block_until_ready(compiled(state, x, jnp.full((1, 1), cfg.max_prefill_predict_length)))


def seconds(step: Callable[[], Any]) -> float:
  start = time.perf_counter()
  step()
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.parse_args()
  import jax

  from maxtext_ling2.model.layer_layout import is_mla

  configs = {context: config(context) for context in CONTEXTS}
  layers = configs[CONTEXTS[0]].num_decoder_layers
  cycle = configs[CONTEXTS[0]].inhomogeneous_layer_cycle_interval
  number_mla = sum(is_mla(i, layers, cycle) for i in range(layers))
  programs: dict[tuple[int, str], Callable[[], Any]] = {}
  for context, cfg in configs.items():
    programs[context, "step"] = decoding_step(cfg)
    programs[context, "MLA"] = attention_step(cfg, mla=True)
    programs[context, "GLA"] = attention_step(cfg, mla=False)
  times: dict[tuple[int, str], list[float]] = {key: [] for key in programs}
  for _ in range(ROUNDS):
    for key, program in programs.items():
      times[key].append(seconds(program))
  median = {key: statistics.median(values[3:]) for key, values in times.items()}
  print(f"ling2-tiny, {number_mla} MLA and {layers - number_mla} GLA layers, {jax.devices()[0].device_kind}")
  print(f"{'context':>8} {'tokens/s':>9} {'ms/token':>9} {'MLA':>6} {'GLA':>6}")
  for context in CONTEXTS:
    step = median[context, "step"]
    mla, gla = number_mla * median[context, "MLA"] / step, (layers - number_mla) * median[context, "GLA"] / step
    print(f"{context:8} {1 / step:9.1f} {1e3 * step:9.2f} {mla:6.1%} {gla:6.1%}")
  last, first = CONTEXTS[-1], CONTEXTS[0]
  print(f"tokens/s at {last} / at {first}: {median[first, 'step'] / median[last, 'step']:.2f}")


if __name__ == "__main__":
  main()
