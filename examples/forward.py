"""Builds a LING2 model with random weights and runs a forward pass: `python examples/forward.py [MODEL_NAME]`."""

import sys

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext_ling2.maxtext_api import session

name = sys.argv[1] if len(sys.argv) > 1 else "ling2-tiny"
platform = session.platform_settings(jax.default_backend())
config = session.make_config(model_name=name, max_target_length=16, per_device_batch_size=1, **platform)
mesh = session.make_mesh(config)
with session.model_context(config, mesh):
  from maxtext.models import models

  model = models.Transformer(config, mesh, quant=None, rngs=nnx.Rngs(params=0, dropout=1))
  tokens = jax.random.randint(jax.random.key(2), (1, 16), 0, config.vocab_size)
  positions = jnp.arange(16)[None]
  segments = jnp.ones_like(tokens)
  logits = model(tokens, positions, segments, enable_dropout=False)
print(
  f"{name} on {jax.default_backend()}: logits {logits.shape} {logits.dtype}, {float(jnp.std(logits)):.3f} their deviation"
)
