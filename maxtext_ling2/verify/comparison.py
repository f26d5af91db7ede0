"""Compares LING2 with recorded outputs of a reference: logits, and the gradient of every parameter.

Everything runs in float32 at the highest matmul precision, through MaxText's own Transformer.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.checkpoint import blocks, decay_offset, hf_config, stacking
from maxtext_ling2.checkpoint.hf_checkpoint import HfCheckpoint
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.maxtext_api.engine import Engine
from maxtext_ling2.maxtext_api.mesh import ONE_DEVICE, VerifyMesh

Array = NDArray[Any]

LOGITS_TOLERANCE = 1e-4
GRADIENT_RELATIVE = 1e-3
GRADIENT_OF_LARGEST = 1e-5


@dataclasses.dataclass(frozen=True)
class LogitsReport:
  """How far the logits are from the reference.

  Attributes:
    max_abs_error: largest absolute difference of a logit.
    max_kl: largest Kullback-Leibler divergence of a position's prediction from the reference's, in nats.
    positions: number of positions compared.
  """

  max_abs_error: float
  max_kl: float
  positions: int

  @property
  def passed(self) -> bool:
    """Whether the largest difference is within `LOGITS_TOLERANCE`; NaN is not."""
    return bool(self.max_abs_error <= LOGITS_TOLERANCE)


@dataclasses.dataclass(frozen=True)
class GradientReport:
  """How far one gradient is from the reference, in units of what is allowed: 1.0 is the limit."""

  name: str
  max_abs_error: float
  excess: float

  @property
  def passed(self) -> bool:
    """Whether every element is within its tolerance; NaN is not."""
    return bool(self.excess <= 1.0)


def make_config(folder: Path, batch: float, length: int, **settings: Any) -> Any:
  """The MaxText config of a Hugging Face folder's model, in float32; `Reference` describes the arguments.

  `words` among the settings are KEY=VALUE of the user, which win over all others.
  """
  raw = hf_config.read(folder)
  hf = hf_config.to_maxtext(raw)
  if (weight := hf_config.mtp_weight(raw)) is not None:  # else MaxText's
    hf["mtp_loss_scaling_factor"] = weight
  sizes = {"max_target_length": length, "max_prefill_predict_length": length, "per_device_batch_size": batch}
  config = session.make_config(model_name="default", **{**hf, **session.FLOAT32_SETTINGS, **sizes, **settings})
  decay_offset.refuse_another(folder, hf.get(decay_offset.FIELD), config.gla_decay_layer_offset)
  session.check_remat_policy(config)
  return config


class Reference:
  """A LING2 model with the weights of a Hugging Face folder, in float32.

  Args:
    folder: the Hugging Face folder.
    batch: rows B of the inputs.
    length: tokens T of a row.
    checkpoint: takes the weights from this MaxText checkpoint instead, restored as MaxText's trainer restores them.
    cut: the mesh to run on; inputs are filled up so that it can cut them evenly.
    rounded_to: rounds the folder's weights to this dtype first, as a conversion with this save_dtype does.
    settings: further MaxText settings, such as gla_decay_layer_offset.

  Raises:
    CheckpointError: the folder is not a LING2 checkpoint; the text names what does not fit.
  """

  def __init__(
    self,
    folder: Path,
    batch: int,
    length: int,
    checkpoint: Path | None = None,
    rounded_to: Any = np.float32,
    cut: VerifyMesh = ONE_DEVICE,
    **settings: Any,
  ):
    self.padding_id: int | None = hf_config.read(folder).get("pad_token_id")
    self.cut = cut
    if cut.devices > 1:
      cut.check_devices()
      batch, length = cut.fill(np.zeros((batch, length), np.int8), 0).shape
      settings = cut.settings() | settings
    self.config = make_config(folder, batch / cut.devices if cut.devices > 1 else batch, length, **settings)
    self.leaves = stacking.leaves(self.config)
    self.mesh = session.make_mesh(self.config)
    if checkpoint is not None:
      values = session.restore(self.config, self.mesh, str(checkpoint))
    else:
      values = self._values(folder, np.dtype(rounded_to))
    self.model = session.make_model(self.config, self.mesh, values)

  def _values(self, folder: Path, dtype: np.dtype[Any]) -> dict[Any, Array]:
    """Reads the folder's weights by path in the model."""
    with HfCheckpoint(folder) as tensors:
      tensors.check(self.config)
      return {
        leaf.path: blocks.stack(leaf, tensors.__getitem__, None if leaf.keeps_dtype else dtype) for leaf in self.leaves
      }

  def logits(self, ids: Array, segments: Array | None = None) -> Array:
    """Logits [B, T, V] float32 for token ids [B, T], with segment ids [B, T] where documents are packed."""
    call, state = self._compiled
    with self.context():
      logits = call(state, self.cut.fill(ids, 0), self._segments(ids, segments))
      return np.asarray(logits)[: ids.shape[0], : ids.shape[1]]

  @functools.cached_property
  def _compiled(self) -> tuple[Any, Any]:
    """(logits of state, ids and segments; the state): jitted once, for all batches of one shape."""
    import jax

    graph, state = self.split()
    return jax.jit(lambda state, ids, segments: self.run(graph, state, ids, segments)[0]), state

  def gradients(self, ids: Array, labels: Array, with_mtp: bool) -> tuple[float, dict[str, Array]]:
    """The loss and its gradient by Hugging Face tensor name.

    Args:
      ids: [B, T].
      labels: [B, T] unshifted: position t is scored against labels[t + 1], -100 is not scored.
      with_mtp: whether the objective includes the MTP loss, times mtp_loss_scaling_factor.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    segments, ids, labels = self._segments(ids, None), self.cut.fill(ids, 0), self.cut.fill(labels, -100)
    targets = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], axis=1)
    scored = (targets != -100).astype(np.int32)
    targets = np.where(scored, targets, 0)
    graph, state = self.split()
    params, rest = state.split(nnx.Param, ...)

    def objective(params: Any) -> Any:
      logits, model = self.run(graph, nnx.State.merge(params, rest), ids, segments, targets, scored)
      picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
      loss = -jnp.sum(picked * scored) / jnp.sum(scored)
      if with_mtp:
        loss += self.config.mtp_loss_scaling_factor * jnp.mean(model.mtp_block.losses.get_value())
      return loss

    with self.context():
      loss, gradient = jax.jit(jax.value_and_grad(objective))(params)
    flat = {path: np.asarray(value.get_value()) for path, value in nnx.to_flat_state(gradient)}
    return float(loss), self.by_hf_name(flat)

  def by_hf_name(self, values: Mapping[Any, Array]) -> dict[str, Array]:
    """Tensors by path in the model, such as gradients, as tensors by Hugging Face name; not all need be there."""
    present = (leaf for leaf in self.leaves if leaf.path in values)
    return {name: tensor for leaf in present for name, tensor in blocks.unstack(leaf, values[leaf.path])}

  def split(self) -> tuple[Any, Any]:
    """The model as (graph definition, state), for a jitted function that merges them by `run`."""
    from flax import nnx

    return nnx.split(self.model)

  def context(self) -> Any:
    """The mesh and axis rules under which the model is traced."""
    return session.model_context(self.config, self.mesh)

  def _segments(self, ids: Array, segments: Array | None) -> Array:
    return self.cut.fill(np.ones_like(ids) if segments is None else segments, 0)

  def run(
    self, graph: Any, state: Any, ids: Any, segments: Any, targets: Any = None, scored: Any = None
  ) -> tuple[Any, Any]:
    """Logits, and the model after the call, which holds its sown values."""
    from flax import nnx

    model = nnx.merge(graph, state, copy=True)
    logits = model(
      decoder_input_tokens=ids,
      decoder_positions=positions_of(segments),
      decoder_segment_ids=segments,
      decoder_target_tokens=targets,
      decoder_target_mask=scored,
      enable_dropout=False,
    )
    return logits, model


def decoded_logits(model: Reference, ids: Array) -> Array:
  """Logits [B, T - N + 1, V] from position N - 1 on, where MaxText's engine gets N = max_prefill_predict_length tokens
  of each row as a prompt and then the row's other tokens one by one.

  Args:
    model: with as many slots as rows B.
    ids: token ids [B, T].
  """
  from flax import nnx

  engine = Engine(model.config, {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model.model))})
  prompt = model.config.max_prefill_predict_length
  found = [np.stack([engine.prefill(row[:prompt], slot)[1] for slot, row in enumerate(ids)])]
  for position in range(prompt, ids.shape[1]):
    found.append(engine.step(dict(enumerate(ids[:, position])))[1][: len(ids)])
  return np.stack(found, axis=1)


def positions_of(segments: Any) -> Any:
  """Positions [B, T] that restart at 0 where the segment id [B, T] changes."""
  import jax
  import jax.numpy as jnp

  index = jnp.arange(segments.shape[1])[None]
  starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
  return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def compare_logits(ours: Array, reference: Array) -> LogitsReport:
  """Compares logits [..., V]."""
  ours, reference = ours.astype(np.float64), reference.astype(np.float64)
  p, q = _log_softmax(reference), _log_softmax(ours)
  kl = np.sum(np.exp(p) * (p - q), axis=-1)
  return LogitsReport(float(np.max(np.abs(ours - reference))), float(np.max(kl)), int(np.prod(ours.shape[:-1])))


def compare_gradients(
  ours: Mapping[str, Array], reference: Mapping[str, Array], padding_id: int | None = None
) -> Iterator[GradientReport]:
  """Compares every gradient of `reference`, element by element.

  Args:
    ours: gradients by Hugging Face tensor name.
    reference: likewise.
    padding_id: the token whose embedding gets no gradient in the Hugging Face code (padding_idx); left out.

  Raises:
    KeyError: a name of the reference is unknown here; it is named.
  """
  for name, theirs in reference.items():
    if name not in ours:
      raise KeyError(f"{name}: the model has no parameter of this name")
    if name == "model.word_embeddings.weight" and padding_id is not None:
      theirs = np.concatenate([theirs[:padding_id], ours[name][padding_id : padding_id + 1], theirs[padding_id + 1 :]])
    allowed = GRADIENT_RELATIVE * np.abs(theirs) + GRADIENT_OF_LARGEST * np.max(np.abs(theirs), initial=0.0)
    error = np.abs(ours[name].astype(np.float64) - theirs)
    excess = np.max(error / np.maximum(allowed, np.finfo(np.float64).tiny), initial=0.0)
    yield GradientReport(name, float(np.max(error, initial=0.0)), float(excess))


def _log_softmax(x: Array) -> Array:
  shifted: Array = x - np.max(x, axis=-1, keepdims=True)
  result: Array = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
  return result
