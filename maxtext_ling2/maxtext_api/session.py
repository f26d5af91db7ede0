"""MaxText used as a library by our own commands: a config for one process, a mesh, a model."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from maxtext_ling2.maxtext_api import start
from maxtext_ling2.maxtext_api.overrides import parse
from maxtext_ling2.maxtext_api.overrides import words as as_words

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
"""Settings of a run that trains nothing and writes nothing, on any device."""

FLOAT32_SETTINGS: dict[str, Any] = {
  "dtype": "float32",
  "weight_dtype": "float32",
  "matmul_precision": "highest",
  "float32_logits": True,
  "float32_qk_product": True,
}
"""Settings for comparing with a reference: everything in float32."""

CPU_SETTINGS: dict[str, Any] = {"dtype": "float32", "sparse_matmul": False}
"""Settings for CPUs: few compute in bfloat16, the others emulate it; the kernels of sparse_matmul are for accelerators,
and a CPU interprets them, at minutes per step."""


def make_config(*, overrides: Sequence[str] = (), base_yml: str | os.PathLike[str] | None = None, **settings: Any) -> Any:
  """Makes a MaxText config (HyperParameters) from a base yml, `TOOL_SETTINGS`, settings and overrides; the last one wins.

  Args:
    base_yml: the user's; None: MaxText's base.yml.
    overrides: KEY=VALUE of the user, which MaxText reads as those of its command line.
    settings: Python values.

  Raises:
    OverrideError: an override is not KEY=VALUE.
    ConfigError: MaxText refuses the settings; it has printed why.
  """
  given = parse(overrides)
  start.set_environment()
  from maxtext.configs import pyconfig

  base = os.path.join(pyconfig.MAXTEXT_CONFIGS_DIR, "base.yml") if base_yml is None else os.fspath(base_yml)
  # In MaxText keyword arguments win over those of the command line.
  others = {key: value for key, value in {**TOOL_SETTINGS, **settings}.items() if key not in given}
  with start.refusals():
    return pyconfig.initialize(["", base, *overrides], **others)


def trainer_config(overrides: Sequence[str], yml: str | None = None) -> Any:
  """Makes the MaxText config that its trainer would have, in one process that writes nothing.

  Args:
    overrides: KEY=VALUE of the user.
    yml: base YAML file; None: MaxText's base.yml.

  Raises:
    OverrideError: an override is not KEY=VALUE.
    ConfigError: MaxText refuses the settings; it has printed why.
  """
  given = parse(overrides)
  start.set_environment()
  from maxtext.configs import pyconfig

  base = yml or os.path.join(pyconfig.MAXTEXT_CONFIGS_DIR, "base.yml")
  with start.refusals():
    return pyconfig.initialize(["", base, *overrides], **{key: TOOL_SETTINGS[key] for key in _SILENT if key not in given})


_SILENT = ("run_name", "base_output_directory", "enable_goodput_recording", "skip_jax_distributed_system", "log_config")
"""Those of `TOOL_SETTINGS` that change nothing of what a trainer reads or computes."""


def platform_settings(platform: str) -> dict[str, Any]:
  """Settings that a platform ("cpu", "gpu" or "tpu") needs: `CPU_SETTINGS` or none."""
  return dict(CPU_SETTINGS) if platform == "cpu" else {}


def changed(config: Any, **fields: Any) -> Any:
  """Copies a MaxText config with other values of some fields, which MaxText does not validate."""
  from maxtext.configs import pyconfig

  return pyconfig.HyperParameters(config._pydantic_config.model_copy(update=fields))


def check_remat_policy(config: Any) -> None:
  """Checks `remat_policy` by MaxText's own table, which MaxText reads only when a model is traced.

  Raises:
    ValueError: it is none of MaxText's policies.
  """
  from maxtext.layers.nnx_decoders import NNXDecoder

  try:
    NNXDecoder.get_remat_policy(SimpleNamespace(config=config, minimal_policy=lambda **_: None))
  except AssertionError as error:
    raise ValueError(f"remat_policy={config.remat_policy}: {error}; use one such as full, minimal or none") from error


def make_mesh(config: Any) -> Any:
  """Builds the device mesh that MaxText's trainer would build."""
  from maxtext.utils import maxtext_utils

  return maxtext_utils.get_mesh_from_config(config)


def make_model(config: Any, mesh: Any, weights: Mapping[Any, Any], seed: int = 0) -> Any:
  """Builds a `maxtext.models.Transformer` (Flax NNX) with given weights, without running any initialiser.

  Args:
    config: MaxText config.
    mesh: device mesh.
    weights: arrays for all parameters and router biases, by path in the model; other state (counters) starts at zero.
    seed: seed of the model's random streams.

  Raises:
    KeyError: the paths of the weights are not those of the model's parameters; the differences are named.
  """
  from flax import nnx

  graph, state = nnx.split(_abstract_model(config, mesh, seed))
  flat = dict(nnx.to_flat_state(state))
  needed = {path for path, variable in flat.items() if _holds_weights(variable)}
  if needed != set(weights):
    raise KeyError(f"no weights for {sorted(needed - set(weights))}; no parameter for {sorted(set(weights) - needed)}")
  filled = [(path, variable.replace(_value(variable, weights.get(path), seed, mesh))) for path, variable in flat.items()]
  return nnx.merge(graph, nnx.from_flat_state(filled))


def restore(config: Any, mesh: Any, checkpoint: str) -> dict[Any, Any]:
  """Restores the weights of a checkpoint by path in the model, by the function that MaxText's trainer uses.

  Args:
    config: MaxText config, in the layout of the checkpoint (`scan_layers`).
    mesh: device mesh; weights are replicated over it.
    checkpoint: as `load_parameters_path`.

  Raises:
    ValueError: MaxText does not find the model's weights.
  """
  import jax
  from flax import nnx
  from maxtext.common import checkpointing

  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  _, state = nnx.split(_abstract_model(config, mesh, seed=0))
  wanted = {path: variable for path, variable in nnx.to_flat_state(state) if _holds_weights(variable)}
  for path, variable in wanted.items():
    value = variable.get_value()
    wanted[path] = variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=everywhere))
  restored = checkpointing.load_params_from_path(
    checkpoint if "://" in checkpoint else os.path.abspath(checkpoint),
    nnx.from_flat_state(list(wanted.items())),
    config.checkpoint_storage_concurrent_gb,
    use_ocdbt=config.checkpoint_storage_use_ocdbt,
    use_zarr3=config.checkpoint_storage_use_zarr3,
  )
  return {path: variable.get_value() for path, variable in nnx.to_flat_state(restored)}


def is_scanned(checkpoint: str) -> bool | None:
  """Whether a MaxText checkpoint (its `items` or a step's folder) was saved with scan_layers; None if not recorded."""
  from maxtext.common import checkpointing

  scanned = checkpointing.load_checkpoint_metadata(checkpoint).get("scan_layers")
  return scanned if isinstance(scanned, bool) else None


def convert(
  yml: str, model_name: str, folder: str, output: str, save_dtype: str, scan: bool, overrides: Sequence[str] = ()
) -> str:
  """Converts a Hugging Face folder by MaxText's own command, in this process.

  Args:
    yml: the base YAML file.
    model_name: MaxText's model_name.
    folder: the Hugging Face folder.
    output: base_output_directory.
    save_dtype: dtype of the weights.
    scan: scan_layers.
    overrides: KEY=VALUE of the user.

  Returns:
    The checkpoint, as `load_parameters_path`.

  Raises:
    ConfigError: MaxText refuses the settings.
  """
  start.set_environment()
  from maxtext.checkpoint_conversion import to_maxtext

  settings = {"model_name": model_name, "base_output_directory": output, "run_name": "conversion", "scan_layers": scan}
  settings |= {"skip_jax_distributed_system": True, "log_config": False}
  with start.refusals():
    to_maxtext.main(
      ["", yml, *as_words(settings), *overrides],
      hf_model_path=folder,
      save_dtype=save_dtype,
      simulated_cpu_devices_count=1,
    )
  return os.path.join(output, "0", "items")


def _abstract_model(config: Any, mesh: Any, seed: int) -> Any:
  """The model's variables as shapes and dtypes."""
  from flax import nnx
  from maxtext.models import models

  def create() -> Any:
    return models.Transformer(config, mesh, quant=None, rngs=nnx.Rngs(params=seed, dropout=seed + 1))

  with model_context(config, mesh):
    return nnx.eval_shape(create)


def _holds_weights(variable: Any) -> bool:
  """Whether a variable is a parameter or a router bias, rather than a random stream or a counter."""
  from flax import nnx
  from maxtext.layers.moe import MoEBiasVar

  return isinstance(variable, (nnx.Param, MoEBiasVar))


def _value(variable: Any, given: Any, seed: int, mesh: Any) -> Any:
  """The given array, a random key, or zeros, in the shape and dtype of an abstract variable."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  abstract = variable.get_value()
  if given is not None:
    value = np.asarray(given).astype(abstract.dtype).reshape(abstract.shape)
    return jax.device_put(value, _sharding(mesh, abstract))
  if isinstance(variable, nnx.RngKey):
    return jax.random.split(jax.random.key(seed), abstract.shape) if abstract.shape else jax.random.key(seed)
  return jnp.zeros(abstract.shape, abstract.dtype)


def _sharding(mesh: Any, abstract: Any) -> Any:
  """MaxText's sharding of a variable; None on one device, replicated if the mesh does not divide it evenly."""
  import jax

  if mesh.size == 1:
    return None
  sharding = jax.sharding.NamedSharding(mesh, getattr(abstract.sharding, "spec", jax.P()))
  try:
    sharding.shard_shape(abstract.shape)
  except ValueError:
    return jax.sharding.NamedSharding(mesh, jax.P())
  return sharding


@contextlib.contextmanager
def model_context(config: Any, mesh: Any) -> Iterator[None]:
  """The mesh and the logical axis rules under which MaxText traces a model."""
  import jax
  from flax.core.spmd import logical_axis_rules

  with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
    yield
