"""LING2 with the weights of a checkpoint, run through MaxText's own Transformer: its logits and gradients.

Everything runs in float32 at the highest matmul precision.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.checkpoint import blocks, decay_offset, hf_config, stacking
from maxtext_ling2.checkpoint.hf_checkpoint import HfCheckpoint
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.maxtext_api.engine import Engine
from maxtext_ling2.maxtext_api.mesh import ONE_DEVICE, MeshSpec
from maxtext_ling2.verify.recording import IGNORED_LABEL

Array = NDArray[Any]


def make_config(folder: Path, batch: float, length: int, **settings: Any) -> Any:
  """The MaxText config of a Hugging Face folder's model, in float32; `Float32Model` describes the arguments.

  `overrides` among the settings are KEY=VALUE of the user, which win over all others.
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


class Float32Model:
  """A LING2 model with the weights of a Hugging Face folder, in float32.

  Args:
    folder: the Hugging Face folder.
    batch: sequences B of the inputs.
    length: tokens T per sequence.
    checkpoint: MaxText checkpoint to take the weights from instead, restored as MaxText's trainer does.
    rounded_to: dtype that the folder's weights are rounded to first, as a conversion with this save_dtype does.
    mesh_spec: the mesh to run on; inputs are padded to sizes that it divides.
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
    mesh_spec: MeshSpec = ONE_DEVICE,
    **settings: Any,
  ):
    self.padding_id: int | None = hf_config.read(folder).get("pad_token_id")
    self.mesh_spec = mesh_spec
    if mesh_spec.devices > 1:
      mesh_spec.check_devices()
      batch, length = mesh_spec.pad(np.zeros((batch, length), np.int8), 0).shape
      # All devices are those of the spec. Over an expert axis XLA's CPU compiler has no ragged all-to-all.
      settings = {"ici_fsdp_parallelism": 1, "sparse_matmul": False} | mesh_spec.settings() | settings
    per_device = batch / mesh_spec.devices if mesh_spec.devices > 1 else batch
    self.config = make_config(folder, per_device, length, **settings)
    self.leaves = stacking.leaves(self.config)
    self.mesh = session.make_mesh(self.config)
    if checkpoint is not None:
      weights = session.restore(self.config, self.mesh, str(checkpoint))
    else:
      weights = self._weights(folder, np.dtype(rounded_to))
    self.model = session.make_model(self.config, self.mesh, weights)

  def _weights(self, folder: Path, dtype: np.dtype[Any]) -> dict[Any, Array]:
    """Reads the folder's weights by path in the model."""
    with HfCheckpoint(folder) as tensors:
      tensors.check(self.config)
      return {
        leaf.path: blocks.stack(leaf, tensors.__getitem__, None if leaf.keeps_dtype else dtype) for leaf in self.leaves
      }

  def logits(self, ids: Array, segments: Array | None = None) -> Array:
    """Logits [B, T, V] float32 for token ids [B, T], with segment ids [B, T] if documents are packed."""
    call, state = self._compiled
    with self.context():
      logits = call(state, self.mesh_spec.pad(ids, 0), self._segments(ids, segments))
      return np.asarray(logits)[: ids.shape[0], : ids.shape[1]]

  @functools.cached_property
  def _compiled(self) -> tuple[Any, Any]:
    """(jitted function of state, ids and segments that returns the logits; the state), for batches of one shape."""
    import jax

    graph, state = self.split()
    return jax.jit(lambda state, ids, segments: self.run(graph, state, ids, segments)[0]), state

  def gradients(self, ids: Array, labels: Array, with_mtp: bool) -> tuple[float, dict[str, Array]]:
    """The loss and its gradient by Hugging Face tensor name.

    Args:
      ids: [B, T].
      labels: [B, T], not shifted: position t predicts labels[t + 1]; `IGNORED_LABEL` is not in the loss.
      with_mtp: whether the objective includes the MTP loss, times mtp_loss_scaling_factor.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    segments, ids, labels = (
      self._segments(ids, None),
      self.mesh_spec.pad(ids, 0),
      self.mesh_spec.pad(labels, IGNORED_LABEL),
    )
    targets = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], IGNORED_LABEL)], axis=1)
    loss_mask = (targets != IGNORED_LABEL).astype(np.int32)
    targets = np.where(loss_mask, targets, 0)
    graph, state = self.split()
    params, rest = state.split(nnx.Param, ...)

    def objective(params: Any) -> Any:
      logits, model = self.run(graph, nnx.State.merge(params, rest), ids, segments, targets, loss_mask)
      picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
      loss = -jnp.sum(picked * loss_mask) / jnp.sum(loss_mask)
      if with_mtp:
        loss += self.config.mtp_loss_scaling_factor * jnp.mean(model.mtp_block.losses.get_value())
      return loss

    with self.context():
      loss, gradient = jax.jit(jax.value_and_grad(objective))(params)
    flat = {path: np.asarray(value.get_value()) for path, value in nnx.to_flat_state(gradient)}
    return float(loss), self.by_hf_name(flat)

  def by_hf_name(self, tensors: Mapping[Any, Array]) -> dict[str, Array]:
    """Converts tensors by path in the model, such as gradients, to tensors by Hugging Face name; some may be missing."""
    present = (leaf for leaf in self.leaves if leaf.path in tensors)
    return {name: tensor for leaf in present for name, tensor in blocks.unstack(leaf, tensors[leaf.path])}

  def split(self) -> tuple[Any, Any]:
    """Splits the model into (graph definition, state), for a jitted function that merges them by `run`."""
    from flax import nnx

    return nnx.split(self.model)

  def context(self) -> Any:
    """The mesh and axis rules under which the model is traced."""
    return session.model_context(self.config, self.mesh)

  def _segments(self, ids: Array, segments: Array | None) -> Array:
    return self.mesh_spec.pad(np.ones_like(ids) if segments is None else segments, 0)

  def run(
    self, graph: Any, state: Any, ids: Any, segments: Any, targets: Any = None, loss_mask: Any = None
  ) -> tuple[Any, Any]:
    """Returns the logits, and the model after the call, which holds its sown values."""
    from flax import nnx

    model = nnx.merge(graph, state, copy=True)
    logits = model(
      decoder_input_tokens=ids,
      decoder_positions=positions_of(segments),
      decoder_segment_ids=segments,
      decoder_target_tokens=targets,
      decoder_target_mask=loss_mask,
      enable_dropout=False,
    )
    return logits, model


def decoded_logits(model: Float32Model, ids: Array) -> Array:
  """Logits [B, T - N + 1, V] from position N - 1 on, decoded by MaxText's engine.

  The first N = max_prefill_predict_length tokens of each sequence are its prompt; the others follow one by one.

  Args:
    model: with as many slots as sequences B.
    ids: token ids [B, T].
  """
  from flax import nnx

  engine = Engine(model.config, {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model.model))})
  prompt = model.config.max_prefill_predict_length
  logits = [np.stack([engine.prefill(sequence[:prompt], slot)[1] for slot, sequence in enumerate(ids)])]
  for position in range(prompt, ids.shape[1]):
    logits.append(engine.step(dict(enumerate(ids[:, position])))[1][: len(ids)])
  return np.stack(logits, axis=1)


def positions_of(segments: Any) -> Any:
  """Positions [B, T], which restart at 0 where the segment id [B, T] changes."""
  import jax
  import jax.numpy as jnp

  index = jnp.arange(segments.shape[1])[None]
  starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
  return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
