"""The rotary embedding of a config.json <-> MaxText settings.

config.json has two layouts. The old one has top-level rope_theta and partial_rotary_factor, and rope_scaling;
transformers 5 writes rope_parameters, which holds all of them, and may keep some at the top level, too. `one_layout`
converts both to the old one.

YaRN rescales the frequencies of both attentions. MaxText has fields for that, but other rules for the two scales that go
with it; those of the Hugging Face code are written as numbers:

  rope_attention_factor: multiplies cos and sin; by transformers' rule, unless rope_scaling names an attention_factor.
  rope_mscale_all_dim: MLA's softmax scale is multiplied by m^2, m = 0.1 * rope_mscale_all_dim * ln(factor) + 1.
"""

from collections.abc import Iterator
from typing import Any

from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.model import yarn

_BETAS = {"beta_fast": 32, "beta_slow": 1}  # transformers' defaults
_TOP_LEVEL = ("rope_theta", "partial_rotary_factor")
_YARN = {
  *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"),
  *("mscale_all_dim", "truncate"),
}
_SMALLEST = {"mscale": 0, "mscale_all_dim": 0, "original_max_position_embeddings": 1}  # of a number; else above 0
_LAYOUTS = ("rope_scaling", "rope_parameters")


def one_layout(config: dict[str, Any]) -> dict[str, Any]:
  """Converts to the old layout: top-level rope_theta, partial_rotary_factor and rope_scaling, no rope_parameters.

  Raises:
    CheckpointError: a layout is damaged, or the two contradict each other; the keys and values are named.
  """
  problems = _layout_problems(config)
  if problems:
    raise CheckpointError("\n".join(problems))
  merged = {key: value for key, value in config.items() if key != "rope_parameters"}
  given = {layout: config.get(layout) or {} for layout in _LAYOUTS}
  for key in _TOP_LEVEL:
    written = [part[key] for part in (config, *given.values()) if part.get(key) is not None]
    if written:
      merged[key] = written[0]
  scaling = given["rope_scaling"] if _kind(given["rope_scaling"]) == "yarn" else given["rope_parameters"]
  stretched = {key: value for key, value in scaling.items() if key not in _TOP_LEVEL}
  merged["rope_scaling"] = stretched if _kind(scaling) == "yarn" else None
  return merged


def _layout_problems(config: dict[str, Any]) -> list[str]:
  damaged = [problem for layout in _LAYOUTS for problem in _validate_layout(layout, config.get(layout))]
  return damaged or list(_validate_agreement(config))


def _validate_layout(layout: str, scaling: Any) -> Iterator[str]:
  """Yields problems of rope_scaling or rope_parameters on its own."""
  if scaling is None:
    return
  if not isinstance(scaling, dict):
    yield f"{layout}={scaling!r}: a {type(scaling).__name__} instead of a JSON object; correct config.json"
    return
  kinds = {str(scaling[key]) for key in ("type", "rope_type") if scaling.get(key) is not None}
  if len(kinds) > 1:
    yield (
      f"{layout}.type={scaling['type']!r}: not {layout}.rope_type={scaling['rope_type']!r}, of which one is ignored; "
      "correct config.json"
    )
    return
  stretches = sorted(set(scaling) - {"type", "rope_type", *_TOP_LEVEL})
  if not kinds and (stretches or layout == "rope_scaling") and scaling:
    yield f'{layout}={scaling!r}: without a type, so it says nothing about how it scales; write "rope_type" into it'
  elif kinds and kinds <= {"default"} and stretches:
    yield (
      f"{layout}.{stretches[0]}={scaling[stretches[0]]!r}: rope_type=default has no such parameter; remove it, or "
      "correct rope_type"
    )
  elif kinds and not kinds <= {"yarn", "default"}:
    yield (
      f"{layout}={scaling!r}: not YaRN, the only scaling LING2 has; to train without, set its rope_type to default and "
      "remove its parameters"
    )
  elif "yarn" in kinds:
    yield from _validate_yarn(layout, scaling)


def _validate_yarn(layout: str, scaling: dict[str, Any]) -> Iterator[str]:
  for key, value in scaling.items():
    if key in ("type", "rope_type", *_TOP_LEVEL) or value is None:
      continue
    if key not in _YARN:
      yield f"{layout}.{key}={value!r}: not a parameter of YaRN that LING2 knows; remove it"
    elif key == "truncate":
      if type(value) is not bool:
        yield f"{layout}.truncate={value!r}: not true or false; correct config.json"
    elif not _is_number(value):
      yield f"{layout}.{key}={value!r}: not a number; correct config.json"
    elif value < _SMALLEST.get(key, 1e-6):
      yield f"{layout}.{key}={value!r}: not positive, as YaRN needs it; correct config.json"


def _validate_agreement(config: dict[str, Any]) -> Iterator[str]:
  """Yields contradictions between the two layouts."""
  given = {layout: config.get(layout) or {} for layout in _LAYOUTS}
  for key in _TOP_LEVEL:
    places = {"": config, "rope_scaling.": given["rope_scaling"], "rope_parameters.": given["rope_parameters"]}
    written = {place + key: part[key] for place, part in places.items() if part.get(key) is not None}
    if len(set(map(str, map(_number, written.values())))) > 1:
      yield _contradiction(written)
  old, new = given.values()
  if not old or not new:
    return
  if _kind(old) != _kind(new):
    yield _contradiction({"rope_scaling.rope_type": _kind(old), "rope_parameters.rope_type": _kind(new)})
  elif _kind(old) == "yarn" and _is_number(config.get("max_position_embeddings")):
    old, new = _complete(config, old), _complete(config, new)
    for key in sorted(_YARN):
      if old[key] != new[key]:
        yield _contradiction({f"rope_scaling.{key}": old[key], f"rope_parameters.{key}": new[key]})


def _contradiction(written: dict[str, Any]) -> str:
  values = ", ".join(f"{key}={value!r}" for key, value in written.items())
  return f"{values}: not equal, so one of them would be ignored; make them agree in config.json, or remove one"


def _number(value: Any) -> Any:
  return float(value) if _is_number(value) else value


def _complete(config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
  """All parameters of YaRN, with defaults for missing ones."""
  parameters = _parameters(config, scaling)
  rest = {"mscale": 1.0, "mscale_all_dim": 0.0, "truncate": True}
  given = {key: scaling.get(key) for key in rest if scaling.get(key) is not None}
  factor = scaling.get("attention_factor") or _attention_factor(parameters["factor"], scaling)
  return parameters | rest | given | {"attention_factor": factor}


def validate(config: dict[str, Any]) -> Iterator[str]:
  """Yields what LING2 cannot represent of a config.json's rotary embedding, one sentence each."""
  problems = _layout_problems(config)
  if problems:
    yield from problems
    return
  config = one_layout(config)
  theta, rotary = config["rope_theta"], _rotary_dims(config)
  if theta != int(theta):
    yield f"rope_theta={theta}: not an integer, as MaxText's rope_max_timescale must be; round it in config.json"
  if rotary != config["qk_rope_head_dim"]:
    yield (
      f"partial_rotary_factor={config['partial_rotary_factor']}: head_dim * factor is {rotary}, not qk_rope_head_dim="
      f"{config['qk_rope_head_dim']}, but the Hugging Face code rotates GLA and MLA with the same frequencies; take the "
      "config.json that belongs to these weights"
    )
  scaling = config["rope_scaling"]
  if scaling is None:
    return
  parameters = _parameters(config, scaling)
  for key in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
    value = parameters[key]
    if value != int(value) or value < 1:
      yield f"rope_scaling.{key}={value}: not a positive integer, as MaxText's field must be; round it in config.json"
  ratio = config["max_position_embeddings"] / parameters["original_max_position_embeddings"]
  if "original_max_position_embeddings" in scaling and ratio != parameters["factor"]:
    yield (
      f"rope_scaling.factor={parameters['factor']}: not max_position_embeddings / original_max_position_embeddings = "
      f"{ratio}, and of these two transformers 4 takes the one, transformers 5 the other; make them agree in config.json"
    )


def _is_number(value: Any) -> bool:
  """Whether a value is a finite number that integers and floats represent exactly."""
  return type(value) in (int, float) and -LARGEST < value < LARGEST


LARGEST = 2**53
"""Upper limit of the numbers of a config.json."""


def _kind(scaling: dict[str, Any]) -> str:
  return str(scaling.get("rope_type") or scaling.get("type") or "default")


def head_dim(config: dict[str, Any]) -> int:
  """Width of a head by the rule of the official class: 128 if the key is absent, hidden_size / heads if null or 0."""
  return int(config.get("head_dim", 128) or config["hidden_size"] // config["num_attention_heads"])


def _rotary_dims(config: dict[str, Any]) -> int:
  return int(head_dim(config) * config["partial_rotary_factor"])


def _parameters(config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
  """The parameters of YaRN, with transformers' defaults for missing ones."""
  longest = config["max_position_embeddings"]
  original = scaling.get("original_max_position_embeddings") or longest
  defaults = {"original_max_position_embeddings": original, "factor": longest / original, **_BETAS}
  return {key: scaling.get(key) or value for key, value in defaults.items()}


def to_maxtext(config: dict[str, Any]) -> dict[str, Any]:
  """Converts rope_scaling or rope_parameters of a valid config.json to MaxText settings."""
  scaling = one_layout(config)["rope_scaling"]
  if scaling is None:
    return {"rope_type": "default", "original_max_position_embeddings": config["max_position_embeddings"]}
  parameters = _parameters(config, scaling)
  all_dim = scaling.get("mscale_all_dim") or 0.0
  return {
    "rope_type": "yarn",
    "rope_factor": int(parameters["factor"]),
    "beta_fast": int(parameters["beta_fast"]),
    "beta_slow": int(parameters["beta_slow"]),
    "original_max_position_embeddings": int(parameters["original_max_position_embeddings"]),
    "rope_truncate": scaling.get("truncate") is not False,  # absent and null mean true
    "mscale": float(scaling.get("mscale") or 1.0),
    "rope_mscale_all_dim": float(all_dim),
    "rope_attention_factor": float(scaling.get("attention_factor") or _attention_factor(parameters["factor"], scaling)),
  }


def _attention_factor(factor: float, scaling: dict[str, Any]) -> float:
  """transformers' rule for the scale of cos and sin."""
  mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
  if mscale and all_dim:
    return yarn.magnitude(factor, mscale) / yarn.magnitude(factor, all_dim)
  return yarn.magnitude(factor, 1.0)


def from_maxtext(config: Any) -> dict[str, Any] | None:
  """rope_scaling of a MaxText config (HyperParameters or pydantic object); None without YaRN.

  The attention factor is written as a number, so that the result does not depend on anyone's rule for it.
  """
  if not yarn.is_yarn(config):
    return None
  return {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": float(config.rope_factor),
    "beta_fast": float(config.beta_fast),
    "beta_slow": float(config.beta_slow),
    "original_max_position_embeddings": config.original_max_position_embeddings,
    "mscale": float(config.mscale),
    "mscale_all_dim": yarn.softmax_mscale(config) or 0.0,
    "attention_factor": yarn.attention_factor(config),
    "truncate": config.rope_truncate,
  }


def validate_export(config: Any) -> Iterator[str]:
  """Yields what config.json cannot represent of a MaxText config's rotary embedding, one sentence each."""
  if not yarn.is_yarn(config):
    return
  if config.mscale < 0:
    yield f"mscale={config.mscale}: negative, which no reader of rope_scaling takes; train and export with a positive one"
  stretched = config.rope_factor * config.original_max_position_embeddings
  if config.max_position_embeddings != stretched:
    yield (
      f"max_position_embeddings={config.max_position_embeddings}: not rope_factor * original_max_position_embeddings = "
      f"{stretched}, but with rope_type=yarn transformers 4 takes the one and transformers 5 the other; export with "
      f"max_position_embeddings={stretched} rope_mscale_all_dim={yarn.softmax_mscale(config) or 0.0} "
      "override_model_config=true, which computes the same"
    )
