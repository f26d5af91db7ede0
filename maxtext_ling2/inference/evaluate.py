"""Loss, perplexity and bits per byte of a trained model on a text."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.checkpoint.decay_offset import FIELD
from maxtext_ling2.inference import saved_model
from maxtext_ling2.inference.saved_model import SavedModel, SavedModelError
from maxtext_ling2.maxtext_api.overrides import parse

LENGTH = 1024
BATCH = 4
BOTH = "both"  # decay offsets


@dataclasses.dataclass(frozen=True)
class Score:
  """Result of an evaluation.

  Attributes:
    nats: sum of the losses of all predicted tokens.
    tokens: number of predicted tokens.
    bytes: UTF-8 bytes of the text.
  """

  nats: float
  tokens: int
  bytes: int

  @property
  def loss(self) -> float:
    """Mean loss per token, in nats."""
    return self.nats / self.tokens

  @property
  def perplexity(self) -> float:
    """exp(loss)."""
    return math.exp(self.loss)

  @property
  def bits_per_byte(self) -> float:
    """Loss in bits per byte of text, comparable between tokenizers."""
    return self.nats / math.log(2) / self.bytes


def evaluate(
  checkpoint: Path,
  text: str,
  *,
  model_name: str | None = None,
  tokenizer: Path | None = None,
  length: int = LENGTH,
  overrides: Sequence[str] = (),
  decay_offset: int | None = None,
) -> Score:
  """Evaluates a model on a text, in independent windows of `length` tokens.

  Each window starts with the last token of the previous one, so that every token but the text's first is predicted.

  Args:
    checkpoint: see `saved_model.open_model`, as for model_name, tokenizer and overrides.
    text: at least two tokens.
    model_name: MaxText's model_name.
    tokenizer: file or folder.
    length: tokens per window.
    overrides: KEY=VALUE settings of MaxText.
    decay_offset: gla_decay_layer_offset; None: that of the folder's config.json, else 0.

  Raises:
    SavedModelError: an argument is invalid.
    ValueError: see `saved_model.open_model`.
  """
  opened, ids = open_with_text(checkpoint, text, model_name, tokenizer, length, overrides, decay_offset)
  return score(token_losses(opened.config, opened.weights, ids), text)


def open_with_text(
  checkpoint: Path,
  text: str,
  model_name: str | None,
  tokenizer: Path | None,
  length: int,
  overrides: Sequence[str],
  decay_offset: int | str | None,
) -> tuple[SavedModel, NDArray[np.int32]]:
  """Opens the model and tokenizes the text; for the arguments see `evaluate`.

  Args:
    checkpoint: see `evaluate`.
    text: at least two tokens.
    model_name: MaxText's model_name.
    tokenizer: file or folder.
    length: tokens per window.
    overrides: KEY=VALUE settings of MaxText.
    decay_offset: `BOTH`: the caller sets it in the config; the folder's is ignored.

  Returns:
    The model, and the token ids [N].

  Raises:
    SavedModelError: an argument is invalid.
    ValueError: see `saved_model.open_model`.
  """
  given = parse(overrides).get(FIELD)
  if None not in (given, decay_offset) and given != str(decay_offset):
    raise SavedModelError(f"--decay-offset {decay_offset} and {FIELD}={given}: two values for one setting; leave one out")
  sizes: dict[str, Any] = {"max_target_length": length, "per_device_batch_size": BATCH}
  if decay_offset not in (None, BOTH):
    sizes[FIELD] = decay_offset
  opened = saved_model.open_model(checkpoint, model_name, tokenizer, sizes, overrides, decay_offset != BOTH)
  ids = np.asarray(opened.tokenizer.encode(text), np.int32)
  if ids.size < 2:
    raise SavedModelError(f"the text has {ids.size} token(s); a loss needs at least two")
  saved_model.check_vocabulary(opened.config, ids)
  return opened, ids


def score(losses: NDArray[np.float32], text: str) -> Score:
  """Sums up the losses [N - 1] of a text's tokens."""
  return Score(float(losses.sum(dtype=np.float64)), losses.size, len(text.encode()))


def token_losses(config: Any, weights: Any, ids: NDArray[np.int32]) -> NDArray[np.float32]:
  """Losses [N - 1] float32 in nats of all tokens but the first, for token ids [N]."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from maxtext_ling2.maxtext_api import session

  mesh = session.make_mesh(config)
  graph, state = nnx.split(session.make_model(config, mesh, weights))

  @jax.jit
  def losses(state: Any, inputs: Any, targets: Any, segments: Any) -> Any:
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    logits = nnx.merge(graph, state, copy=True)(inputs, positions, segments, enable_dropout=False)
    picked = jnp.take_along_axis(logits.astype(jnp.float32), targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) - picked

  found = []
  with session.model_context(config, mesh):
    for inputs, targets, segments in batches(ids, config.max_target_length, config.global_batch_size_to_train_on):
      found.append(np.asarray(losses(state, inputs, targets, segments))[segments > 0])
  return np.concatenate(found)


def batches(ids: NDArray[np.int32], length: int, batch: int) -> Any:
  """Yields (inputs, targets, segment ids), each [batch, length] int32: the windows of a text, padded at the end."""
  count = ids.size - 1
  windows = -(-count // length)
  size = -(-windows // batch) * batch * length
  inputs, targets, segments = (np.zeros(size, np.int32) for _ in range(3))
  inputs[:count], targets[:count], segments[:count] = ids[:-1], ids[1:], 1
  yield from zip(*(x.reshape(-1, batch, length) for x in (inputs, targets, segments)), strict=True)
