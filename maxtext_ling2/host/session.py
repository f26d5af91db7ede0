"""MaxText used as a library by our own tools: a config for one process, a mesh, a model."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

TOOL_SETTINGS: dict[str, Any] = {
  "run_name": "maxtext-ling2",
  "base_output_directory": "maxtext_output",
  "enable_checkpointing": False,
  "enable_goodput_recording": False,
  "skip_jax_distributed_system": True,
  "log_config": False,
  "dataset_type": "synthetic",
  "override_model_config": True,
  "attention": "dot_product",
  "megablox": False,
  "scan_layers": False,
}
"""Settings of a run that trains nothing and writes nothing, on whatever devices there are."""

FLOAT32_SETTINGS: dict[str, Any] = {
  "dtype": "float32",
  "weight_dtype": "float32",
  "matmul_precision": "highest",
  "float32_logits": True,
  "float32_qk_product": True,
}
"""MaxText's bar for comparing with a reference: everything in float32."""


def make_config(**settings: Any) -> Any:
  """A MaxText config (HyperParameters) from base.yml, `TOOL_SETTINGS` and the given settings, the last ones first.

  Raises:
    ValueError: MaxText refuses the settings. Outside pytest it prints why and would end the process.
  """
  import maxtext_ling2  # noqa: F401  the plugin, where no .pth file brought it

  os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
  from maxtext.configs import pyconfig

  base = os.path.join(pyconfig.MAXTEXT_CONFIGS_DIR, "base.yml")
  try:
    return pyconfig.initialize(["", base], **{**TOOL_SETTINGS, **settings})
  except SystemExit as error:
    raise ValueError("MaxText refuses this configuration; its reason stands above") from error


def make_mesh(config: Any) -> Any:
  """The device mesh that MaxText's trainer would build."""
  from maxtext.utils import maxtext_utils

  return maxtext_utils.get_mesh_from_config(config)


def make_model(config: Any, mesh: Any, values: Mapping[Any, Any], seed: int = 0) -> Any:
  """A `maxtext.models.Transformer` (flax NNX) with given weights, built without running any initialiser.

  Args:
    config: MaxText config.
    mesh: device mesh.
    values: arrays for all parameters and router biases, by path in the model; other state (counters) starts at zero.
    seed: of the model's random streams.

  Raises:
    KeyError: a parameter has no value, or a value no parameter; the paths are named.
  """
  from flax import nnx
  from maxtext.models import models

  def create() -> Any:
    return models.Transformer(config, mesh, quant=None, rngs=nnx.Rngs(params=seed, dropout=seed + 1))

  with model_context(config, mesh):
    abstract = nnx.eval_shape(create)
  graph, state = nnx.split(abstract)
  flat = dict(nnx.to_flat_state(state))
  needed = {path for path, variable in flat.items() if _holds_weights(variable)}
  if needed != set(values):
    raise KeyError(f"no value for {sorted(needed - set(values))}; no parameter for {sorted(set(values) - needed)}")
  filled = [(path, variable.replace(_value(variable, values.get(path), seed))) for path, variable in flat.items()]
  return nnx.merge(graph, nnx.from_flat_state(filled))


def _holds_weights(variable: Any) -> bool:
  """Whether a variable is a parameter or a router bias, rather than a random stream or a counter."""
  from flax import nnx
  from maxtext.layers.moe import MoEBiasVar

  return isinstance(variable, (nnx.Param, MoEBiasVar))


def _value(variable: Any, given: Any, seed: int) -> Any:
  """The given array, a random key, or zeros, in the shape and dtype of an abstract variable."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  abstract = variable.get_value()
  if given is not None:
    return jnp.asarray(given, abstract.dtype).reshape(abstract.shape)
  if isinstance(variable, nnx.RngKey):
    return jax.random.split(jax.random.key(seed), abstract.shape) if abstract.shape else jax.random.key(seed)
  return jnp.zeros(abstract.shape, abstract.dtype)


@contextlib.contextmanager
def model_context(config: Any, mesh: Any) -> Iterator[None]:
  """The mesh and the logical axis rules under which MaxText traces a model."""
  import jax
  from flax.core.spmd import logical_axis_rules

  with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
    yield
