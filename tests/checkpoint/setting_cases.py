"""Which config fields a tiny model reads, other values for them, and what becomes of each in an exported config.json."""

import collections
import copy
import dataclasses
import enum
import gc
import hashlib
import re
import sys
import time
import types as builtin_types
import typing
import zlib
from pathlib import Path

import jax
import numpy as np
import pydantic
from flax import nnx
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import partial_eval
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.configs import pyconfig, types
from maxtext.layers.moe import MoEBiasVar
from maxtext.layers.multi_token_prediction import mtp_losses
from maxtext.utils import model_creation_utils

import maxtext_ling2
import tiny
from maxtext_ling2.checkpoint import hf_config, mapping
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.maxtext_api import session

# GLA with a dense MLP and MLA with experts: few layers, because building and tracing them takes the time. MTP, GLA with
# experts, YaRN and the layer scan come as changes. int(head_dim * partial_rotary_factor) == qk_rope_head_dim and a shared
# width of two experts, so that it can be exported.
TINY = {
  "model_name": "ling2-tiny",
  "base_emb_dim": 32,
  "base_num_decoder_layers": 2,
  "mtp_num_layers": 0,
  "inhomogeneous_layer_cycle_interval": 2,
  "base_num_query_heads": 4,
  "base_num_kv_heads": 4,
  "head_dim": 8,
  "base_mlp_dim": 48,
  "base_moe_mlp_dim": 16,
  "moe_shared_expert_dim": 32,
  "num_experts": 8,
  "num_experts_per_tok": 2,
  "n_routing_groups": 4,
  "topk_routing_group": 2,
  "q_lora_rank": 16,
  "kv_lora_rank": 16,
  "qk_nope_head_dim": 8,
  "qk_rope_head_dim": 4,
  "v_head_dim": 8,
  "vocab_size": 64,
  "max_target_length": 24,
  "max_prefill_predict_length": 24,
  "per_device_batch_size": 2,
  **session.FLOAT32_SETTINGS,
}
SCANNED = {"scan_layers": True, "base_num_decoder_layers": 5}
"""Two whole cycles, of which the second is scanned, and a trailing layer: GLA with experts, too."""

MTP = {"mtp_num_layers": 2, "mtp_eval_target_module": 1}
YARN = {"rope_type": "yarn", "rope_factor": 4, "max_position_embeddings": 64, "original_max_position_embeddings": 16}
"""Some of a row's 24 tokens are beyond the original positions."""

ROWS, LENGTH = 2, 24
FIELDS = types.MaxTextConfig.model_fields
OURS = Path(maxtext_ling2.__file__).parent


# ---- configs


class Configs:
  """Configs of TINY with changes, made from what MaxText hands to pydantic: reading base.yml each time takes 1 s."""

  def __init__(self):
    prepare = pyconfig._prepare_for_pydantic

    def keep(raw, *args, **kwargs):
      self._raw = copy.deepcopy(raw)
      return prepare(raw, *args, **kwargs)

    pyconfig._prepare_for_pydantic = keep
    try:
      session.make_config(**TINY)
    finally:
      pyconfig._prepare_for_pydantic = prepare

  def make(self, **changes):
    settings = pyconfig._prepare_for_pydantic({**copy.deepcopy(self._raw), **copy.deepcopy(changes)})
    return pyconfig.HyperParameters(types.MaxTextConfig(**settings))


def plain(value):
  """A config's value as something that compares and prints well."""
  if isinstance(value, enum.Enum):
    return value.value
  if isinstance(value, np.dtype):
    return value.name
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if isinstance(value, dict):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, pydantic.BaseModel):
    return plain(value.model_dump())
  return value


def everything(config):
  return {name: plain(value) for name, value in config.get_keys().items()}


def raised_by_us(error):
  """Whether an exception, or what pydantic wraps in it, comes from a rule of this package."""
  errors = [error]
  if isinstance(error, pydantic.ValidationError):
    errors = [part["ctx"]["error"] for part in error.errors() if isinstance(part.get("ctx", {}).get("error"), Exception)]
  return any(_file(one).is_relative_to(OURS) for one in errors)


def _file(error):
  tb = error.__traceback__
  while tb is not None and tb.tb_next is not None:
    tb = tb.tb_next
  return Path(tb.tb_frame.f_code.co_filename) if tb is not None else Path()


def names(error, field):
  return re.search(rf"(?<!\w){field}(?!\w)", str(error)) is not None


def one_line(error, width=160):
  text = " ".join(str(error).split())
  return text if len(text) <= width else text[: width - 3] + "..."


# ---- what is read


class Reads:
  """Notes each field that is read from a config, and where."""

  def __enter__(self):
    self.sites = set()
    self._original = pyconfig.HyperParameters.__getattr__
    original, sites = self._original, self.sites

    def noted(config, name):
      if name in FIELDS:
        frame = sys._getframe(1)
        while frame.f_code.co_filename.endswith("moe_view.py"):
          frame = frame.f_back
        sites.add((name, frame.f_code.co_filename, frame.f_lineno))
      return original(config, name)

    pyconfig.HyperParameters.__getattr__ = noted
    return self

  def __exit__(self, *_):
    pyconfig.HyperParameters.__getattr__ = self._original


# ---- programs


@dataclasses.dataclass
class Program:
  """A traced forward pass.

  Attributes:
    key: equal for programs that compute the same, and of the same parameters.
    inputs: {path: (shape, dtype)} of the parameters.
    closed: its jaxpr; parameters in the order of `paths`, then token ids, positions and segments.
    paths: of all state of the model.
    leaves: the state's abstract values.
    sites: what was read to make it.
  """

  key: tuple
  inputs: dict
  closed: object
  paths: list
  leaves: list
  sites: set


def trace(config):
  """Builds the model as MaxText's trainer does and traces its logits and the sums of its MTP losses."""
  with Reads() as reads:
    mesh = session.make_mesh(config)
    with session.model_context(config, mesh):
      model = nnx.eval_shape(
        lambda: model_creation_utils.create_model(config, mesh, rngs=nnx.Rngs(params=0, dropout=1, aqt=2))
      )
      graph, state = nnx.split(model)
      flat = list(nnx.to_flat_state(state))
      values = [variable.get_value() for _, variable in flat]

      def forward(values, ids, positions, segments):
        new = [(path, variable.replace(value)) for (path, variable), value in zip(flat, values, strict=True)]
        model = nnx.merge(graph, nnx.from_flat_state(new))
        logits = model(
          ids,
          positions,
          decoder_segment_ids=segments,
          enable_dropout=False,
          decoder_target_tokens=ids,
          decoder_target_mask=segments,
        )
        if logits is None:  # num_vocab_tiling: the loss makes them of the hidden states, piece by piece
          hidden = model.decoder.hidden_states.get_value()[0]
          logits = model.logits_from_hidden_states_for_vocab_tiling(hidden, True, MODEL_MODE_TRAIN)
        return logits, jax.tree.leaves(nnx.state(model, mtp_losses))

      whole = jax.ShapeDtypeStruct((ROWS, LENGTH), np.int32)
      closed = jax.make_jaxpr(forward)(values, whole, whole, whole)
  jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  paths = [path for path, _ in flat]
  kept = [path for path, use in zip(paths, used, strict=False) if use]
  inputs = {
    path: (value.shape, value.dtype)
    for (path, variable), value in zip(flat, values, strict=True)
    if isinstance(variable, nnx.Param | MoEBiasVar)
  }
  key = (_Printer().closed(jaxpr, closed.consts), tuple(kept), tuple(sorted(inputs.items(), key=str)))
  return Program(key, inputs, closed, paths, values, reads.sites)


class _Printer:
  """A jaxpr as text, five times as fast as JAX's own, and with the values of constants.

  Two programs of one text compute the same; two that compute the same may have different texts.
  """

  def __init__(self):
    self._lines = []

  def closed(self, jaxpr, consts):
    self._jaxpr(jaxpr, consts)
    return hashlib.sha256("\n".join(self._lines).encode()).hexdigest()

  def _jaxpr(self, jaxpr, consts=()):
    numbers = {}

    def atom(var):
      if hasattr(var, "val"):
        return f"{self._value(var.val)}:{var.aval.str_short()}"
      return f"{numbers.setdefault(var, len(numbers))}:{var.aval.str_short()}"

    self._lines.append(f"in {[atom(v) for v in (*jaxpr.constvars, *jaxpr.invars)]} {[self._value(c) for c in consts]}")
    for eqn in jaxpr.eqns:
      parameters = [f"{name}={self._value(eqn.params[name])}" for name in sorted(eqn.params)]
      self._lines.append(
        f"{eqn.primitive} {[atom(v) for v in eqn.invars]} {[atom(v) for v in eqn.outvars]} {' '.join(parameters)}"
      )
    self._lines.append(f"out {[atom(v) for v in jaxpr.outvars]}")

  def _value(self, value):
    if hasattr(value, "jaxpr") and hasattr(value, "consts"):
      self._jaxpr(value.jaxpr, value.consts)
      return "above"
    if hasattr(value, "eqns"):
      self._jaxpr(value)
      return "above"
    if isinstance(value, list | tuple):
      return [self._value(item) for item in value]
    if isinstance(value, np.ndarray | jax.Array):
      array = np.asarray(value)
      return f"{array.dtype}{array.shape}{hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


class Homeless(Exception):
  """The model has parameters that no tensor of an exported checkpoint holds, or the other way round."""


def weights(config, program):
  """Random values of all parameters by path, the same for a per-layer tensor wherever it stands."""

  def one(entry):
    rng = np.random.default_rng(zlib.crc32("/".join(entry.path).encode()))
    value = 0.3 * rng.standard_normal(entry.shape)
    return (value + (entry.path[-1] == "scale")).astype(np.float32)

  given = tiny.stacked(config, {entry: one(entry) for entry in mapping.entries(config)})
  without, spare = set(program.inputs) - set(given), set(given) - set(program.inputs)
  if without or spare:
    raise Homeless(f"exported without {short(without)}; exported, but not in the model: {short(spare)}")
  wrong = {path for path in given if given[path].shape != program.inputs[path][0]}
  if wrong:
    raise Homeless(f"of another shape in the model: {short(wrong)}")
  return given


def short(paths):
  found = sorted({".".join(map(str, path[-3:])) for path in paths})
  return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "") or "nothing"


def tokens():
  """Token ids, positions and segments of rows of two documents and padding."""
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 32, (ROWS, LENGTH)).astype(np.int32)
  segments = np.ones((ROWS, LENGTH), np.int32)
  segments[0, 10:], segments[1, 15:], segments[:, 22:] = 2, 2, 0
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), segments.shape).copy()
  positions[0, 10:] -= 10
  positions[1, 15:] -= 15
  return ids, positions, segments


def run(config, program):
  """[logits, MTP losses ...] as float32 arrays, of random weights."""
  given = weights(config, program)
  values = []
  for path, abstract in zip(program.paths, program.leaves, strict=True):
    if path in given:
      values.append(given[path].astype(abstract.dtype))
    elif jax.dtypes.issubdtype(abstract.dtype, jax.dtypes.prng_key):
      keys = jax.random.split(jax.random.key(0), abstract.shape) if abstract.shape else jax.random.key(0)
      values.append(keys)
    elif "scale" in str(path[-1]):  # of fp8: where nothing was measured yet
      values.append(np.ones(abstract.shape, abstract.dtype))
    else:
      values.append(np.zeros(abstract.shape, abstract.dtype))
  mesh = session.make_mesh(config)
  with session.model_context(config, mesh):
    outputs = jax.jit(jaxpr_as_fun(program.closed))(*values, *tokens())
  ids, positions, segments = tokens()
  logits, *rest = (np.asarray(output, np.float32) for output in outputs)
  return [logits[segments != 0], *rest]


# ---- other values

VALUES = {
  "attention": ["flash", "autoselected", "cudnn_flash_te", "paged"],
  "context_parallel_strategy": ["ring"],
  "custom_mesh": ["hybrid_ring_64x4"],
  "engram_layers": [[1]],
  "experts_backend": ["maxtext"],
  "gla_backend": ["chunked", "reference", "pallas"],
  "ici_parallelism": [[2, *11 * [1]]],
  "logical_axis_rules": [[]],
  "logical_axis_rules_for_eval": [[]],
  "mesh_axes": [["data"]],
  "mlp_activations": [["gelu", "linear"], ["silu"], ["relu", "linear"], ["linear", "silu"]],
  "model_call_mode": ["inference"],
  "remat_policy": ["none", "minimal"],
  "routed_bias_dtype": ["bfloat16", ""],
  "routed_score_func": ["softmax", ""],
  "subslice_shape": ["2x2"],
  "unquantized_modules": [["mlp"]],
}
"""Values for the fields that are strings or lists: their types do not tell what they may be."""


def other_values(name, current):
  """Values to try, the likeliest to matter first; none where the type does not tell."""
  current = plain(current)
  if name in VALUES:
    return [value for value in VALUES[name] if value != current]
  values = []
  for option in _options(FIELDS[name].annotation):
    if isinstance(option, type) and issubclass(option, enum.Enum):
      values += [member.value for member in option]
    elif typing.get_origin(option) is typing.Literal:
      values += typing.get_args(option)
    elif option is bool:
      values += [True, False]
    elif option is int:
      values += _integers(current)
    elif option is float:
      values += _floats(current)
    elif option is str:
      values += ["something-else"]
  unique = {repr(value): value for value in values if value != current or type(value) is not type(current)}
  return [value for value in unique.values() if value is not None]


def _options(annotation):
  if typing.get_origin(annotation) in (typing.Union, builtin_types.UnionType):
    return [option for part in typing.get_args(annotation) for option in _options(part)]
  if typing.get_origin(annotation) is typing.Annotated:
    return _options(typing.get_args(annotation)[0])
  return [getattr(annotation, "__supertype__", annotation)]


def _is_count(value):
  return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _integers(current):
  if not _is_count(current):
    return [2, 1, 0, -1, 16]
  return [2 * int(current), int(current) + 1, int(current) // 2, 1, 0, -1]


def _floats(current):
  if not _is_count(current):
    return [0.5, 1.0, 2.0, 0.0, -1.0]
  small = [0.01] if current < 1e-3 else []  # twice an epsilon would move nothing beyond the tolerance
  return [*small, 2.0 * current, current / 2, 0.0, -1.0]


# ---- outcomes

CONFIG, EXPORT = "refused by config", "refused by export"
CARRIED, NO_EFFECT, ROUNDING = "carried", "no effect", "rounding"
LOST, UNNAMED = "LOST", "REFUSED WITHOUT ITS NAME"
NOT_SET, NOT_HERE, NO_VALUE = "not set", "cannot run here", "no other value known"

OUTCOMES = (CONFIG, EXPORT, CARRIED, NO_EFFECT, ROUNDING, LOST, UNNAMED, NOT_SET, NOT_HERE, NO_VALUE)
HELD = (EXPORT, CARRIED, NO_EFFECT, ROUNDING, LOST)
"""Outcomes of fields that the config really held at another value."""
BAD = (LOST, UNNAMED)

TOLERANCE = 5e-5
"""Of logits (standard deviation about 2, at most about 8) in float32: the same sums in another order differ by 1.5e-5."""

FLOAT32, BFLOAT16, EIGHT_BITS = 2.0**-20, 2.0**-8, 2.0**-4
ROUNDS = {
  "gla_backend": FLOAT32,  # sums in another order, which the norm of a small output enlarges: 8 of 2^-23
  **dict.fromkeys(("dtype", "weight_dtype", "matmul_precision"), BFLOAT16),
  **dict.fromkeys(("float32_logits", "float32_qk_product", "float32_weight_sum", "activations_in_float32"), BFLOAT16),
  **dict.fromkeys(("logits_dot_in_fp32", "cast_logits_to_fp32", "routed_bias_dtype"), BFLOAT16),
  **dict.fromkeys(("quantization", "use_qwix_quantization", "quantization_local_shard_count"), EIGHT_BITS),
  **dict.fromkeys(("experimental_sa_quant_q_fp8", "experimental_sa_quant_k_fp8"), EIGHT_BITS),
}
"""Fields that choose how the same function is rounded, which no config.json says: -> the unit of that rounding.

A typical logit may move by `ROUNDINGS` units of the logits' standard deviation. Typical, not every: where rounding makes
the router choose another expert, the logits of that token move as far as any.
"""
ROUNDINGS = 6


@dataclasses.dataclass
class Case:
  """One value of one field.

  Attributes:
    field: its name.
    value: what it was set to.
    base: the settings it was changed in, on top of TINY.
    outcome: one of the constants above.
    note: why, or by how much.
  """

  field: str
  value: object
  base: dict
  outcome: str
  note: str = ""

  def __str__(self):
    where = f" with {', '.join(f'{key}={value}' for key, value in self.base.items())}" if self.base else ""
    return f"{self.field}={one_line(repr(self.value), 60)}{where}: {self.outcome}{f': {self.note}' if self.note else ''}"


class Survey:
  """Changes each field that is read, alone, in TINY and wherever a change of one field makes the model read more.

  Attributes:
    cases: what became of each value of each field.
    reads: the fields that were read.
    derived: {field: those that MaxText derives from it} for fields that the model reads in another form.
  """

  def __init__(self, log=lambda case: None, only=None):
    self.cases, self.reads, self.derived = [], set(), {}
    self._configs = Configs()
    self._log, self._only = log, only
    self._programs, self._outputs, self._seen = {}, {}, set()

  def run(self):
    gc.freeze()  # what is imported by now need not be searched for garbage after every trace
    try:
      self._run()
    finally:
      gc.unfreeze()
    return self

  def _run(self):
    roots = ({}, SCANNED, YARN, MTP)
    queue = collections.deque(roots)
    while queue:
      base = queue.popleft()
      config = self._configs.make(**base)
      fields = self._new_fields(self._program(config))
      if base:
        fields -= set(ROUNDS)  # TINY alone tells
      else:
        fields |= self._sources(config, fields)
      todo, done = collections.deque(sorted(fields)), set() if base in roots else set(base)
      while todo:
        if (field := todo.popleft()) in done:
          continue
        done.add(field)
        for value, program in self._change(base, field):
          if program is None or not program.sites - self._seen:
            continue
          if self.cases[-1].outcome in (EXPORT, LOST):
            # What is read only then is changed without it; another root that reads it there has it change in earnest.
            fields = {name for name, *_ in program.sites - self._seen}
            self.reads |= fields
            todo.extend(sorted(fields))
          else:
            queue.append({**base, field: value})

  def of(self, *outcomes):
    """The fields that had one of these outcomes."""
    return {case.field for case in self.cases if case.outcome in outcomes}

  def _new_fields(self, program):
    """The fields that a program reads at places where none before it read them."""
    fields = {name for name, *_ in program.sites - self._seen}
    self._seen |= program.sites
    self.reads |= fields
    return fields

  def _sources(self, config, fields):
    """The fields that MaxText derives those which are read from: base_X of X, and what moves one when it is changed."""
    before, found = everything(config), {f"base_{field}" for field in fields} & set(FIELDS)
    for name in sorted(set(FIELDS) - fields - found):
      for value in other_values(name, before.get(name))[:3]:
        try:
          after = everything(self._configs.make(**{name: value}))
        except Exception:
          continue
        moved = sorted(field for field in fields if after[field] != before[field])
        if moved:
          self.derived[name] = moved
          found.add(name)
          break
    self.reads |= found
    return found

  def _change(self, base, field):
    """Tries other values of a field; yields (value, program), the program None where nothing need be traced."""
    if self._only is not None and field not in self._only:
      return
    current = getattr(self._configs.make(**base), field)
    values = other_values(field, current)
    if not values:
      self._note(Case(field, plain(current), base, NO_VALUE, str(FIELDS[field].annotation)))
    idle, refused = 0, False
    for value in values:
      case, program = self.judge(field, value, base, explore=not refused)
      refused |= case.outcome == EXPORT
      self._note(case)
      yield value, program
      idle += case.outcome == NO_EFFECT
      if idle == (1 if isinstance(value, int | float) else 2):
        break

  def _note(self, case):
    self.cases.append(case)
    self._log(case)

  def judge(self, field, value, base=None, export=None, explore=False):
    """(case, program or None) of one value of one field.

    Args:
      field: its name.
      value: what it is set to.
      base: the settings that it is changed in.
      export: stands in for the package's.
      explore: traces the program also where the case is clear without it.
    """
    base, export = base or {}, export or hf_config.from_maxtext

    def case(outcome, note="", program=None):
      return Case(field, value, base, outcome, one_line(note)), program

    before = self._configs.make(**base)
    try:
      changed = self._configs.make(**{**base, field: value})
    except Exception as error:
      if names(error, field):
        return case(CONFIG, error)
      return case(UNNAMED if raised_by_us(error) else NOT_SET, error)
    if plain(getattr(changed, field)) == plain(getattr(before, field)):
      return case(NOT_SET, "MaxText overrides it")
    try:
      exported = export(changed)
    except CheckpointError as error:
      program = self._try_program(changed)[0] if explore else None
      return case(EXPORT if names(error, field) else UNNAMED, error, program)
    try:
      again = self._configs.make(**{**base, **hf_config.to_maxtext(exported)})
    except (CheckpointError, pydantic.ValidationError) as error:
      return case(LOST, f"exported as a file that cannot be read: {error}")
    same = NO_EFFECT if exported == export(before) else CARRIED
    if everything(again) == everything(changed):
      switch = not value or not isinstance(value, int | float)  # with another size or rate the model reads the same
      return case(same, "same settings", self._try_program(changed)[0] if explore and switch else None)
    program, error = self._try_program(changed)
    if program is None:
      return case(NOT_HERE, error)
    other = self._program(again)
    if program.key == other.key:
      return case(same, "same program", program)
    try:
      ours, theirs = self._output(changed, program), self._output(again, other)
    except Homeless as error:
      return case(LOST, error, program)
    except Exception as error:
      return case(NOT_HERE, f"{type(error).__name__}: {error}")
    if (largest := _largest(ours, theirs)) <= TOLERANCE:
      return case(same, f"logits differ by {largest:.2g}", program)
    typical = _typical(ours, theirs)
    if field in ROUNDS and typical <= ROUNDINGS * ROUNDS[field]:
      return case(ROUNDING, f"a typical logit differs by {typical:.2g} standard deviations", program)
    return case(LOST, f"logits differ by {largest:.2g}, a typical one by {typical:.2g} standard deviations", program)

  def _try_program(self, config):
    try:
      return self._program(config), None
    except Exception as error:
      return None, f"{type(error).__name__}: {error}"

  def _program(self, config):
    """The program of a config; the last few are kept, because most fields change nothing of the one before."""
    key = repr(sorted(everything(config).items()))
    program = self._programs.pop(key, None) or trace(config)
    self._programs[key] = program
    if len(self._programs) > 8:
      del self._programs[next(iter(self._programs))]
    return program

  def _output(self, config, program):
    if program.key not in self._outputs:
      self._outputs[program.key] = run(config, program)
    return self._outputs[program.key]


def _largest(ours, theirs):
  """The largest difference of any number; infinity where there are others, or NaN."""
  if [a.shape for a in ours] != [b.shape for b in theirs]:
    return np.inf
  difference = max(float(np.max(np.abs(a - b))) for a, b in zip(ours, theirs, strict=True))
  return difference if np.isfinite(difference) else np.inf


def _typical(ours, theirs):
  """The median difference of logits, in standard deviations of the logits; infinity as in `_largest`."""
  a, b = ours[0], theirs[0]
  return float(np.median(np.abs(a - b)) / np.std(b)) if a.shape == b.shape and np.isfinite(a).all() else np.inf


def main():
  """Prints what becomes of the fields on the command line, or of all, with the seconds of CPU time that it took."""

  def log(case):
    print(f"{time.process_time():6.1f} {case}", flush=True)

  survey = Survey(log, only=sys.argv[1:] or None).run()
  print(collections.Counter(case.outcome for case in survey.cases), len(survey.reads), survey.derived)


if __name__ == "__main__":
  main()
