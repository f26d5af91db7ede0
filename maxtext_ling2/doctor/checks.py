"""Finds out whether a LING2 run would work in this environment, and if not, why and what to do."""

import dataclasses
import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import Any

from maxtext_ling2 import discovery, plugin, startup
from maxtext_ling2.configs.fields import FIELDS
from maxtext_ling2.configs.validation import CUSTOM_MODEL
from maxtext_ling2.doctor import last_check
from maxtext_ling2.errors import INSTALL
from maxtext_ling2.host.contract import HINT, Violation
from maxtext_ling2.host.registry import Registry
from maxtext_ling2.maxtext_api import contract as library_contract

_VARIABLES = (
  startup.DISABLE_VARIABLE,
  discovery.ALLOW_VARIABLE,
  "M_MODEL_NAME",
  "JAX_PLATFORMS",
  "XLA_FLAGS",
  "DECOUPLE_GCLOUD",
)
_DISTRIBUTIONS = ("maxtext-ling2", "maxtext", "jax", "jaxlib", "flax", "pydantic", "libtpu", "wrapt", "aenum")


@dataclasses.dataclass(frozen=True)
class Issue:
  """Something wrong (or only noteworthy) and its remedy."""

  what: str
  remedy: str


@dataclasses.dataclass
class Diagnosis:
  """All that was found.

  Attributes:
    versions: distribution -> version, None where it is not installed; "tested maxtext" lists what was tested.
    start: how the plugin came into this process, and every entry point of the group.
    environment: the variables that matter, as they are set.
    seams: name, module, state and violations of each seam; empty, as models and fields, where `checked` is set.
    checked: the day of an earlier check of seams, fields and models, since which nothing installed has changed.
    models: model name -> problem with its configuration, None if it is fine.
    fields: field name -> who defines it.
    backends: JAX's platform and devices, and the implementations of linear attention.
    faults: what keeps a LING2 run from working.
    notes: what does not, but should be known.
  """

  versions: dict[str, Any]
  start: dict[str, Any]
  environment: dict[str, str | None]
  seams: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  checked: str | None = None
  models: dict[str, str | None] = dataclasses.field(default_factory=dict)
  fields: dict[str, str] = dataclasses.field(default_factory=dict)
  backends: dict[str, Any] = dataclasses.field(default_factory=dict)
  faults: list[Issue] = dataclasses.field(default_factory=list)
  notes: list[Issue] = dataclasses.field(default_factory=list)

  @property
  def ok(self) -> bool:
    """Whether a LING2 run would work."""
    return not self.faults

  def to_json(self) -> dict[str, Any]:
    """Plain data, "ok" first."""
    return {"ok": self.ok, **dataclasses.asdict(self)}


def diagnose(*, again: bool = True) -> Diagnosis:
  """Looks at everything a LING2 run needs; imports MaxText, trains nothing.

  Args:
    again: check seams, fields and models also where an earlier check found them fine and nothing installed has changed.
  """
  found = Diagnosis(_versions(), {"found_by": startup.found_by}, {name: os.environ.get(name) for name in _VARIABLES})
  if startup.disabled():
    found.faults.append(
      Issue(f"{startup.DISABLE_VARIABLE}={os.environ[startup.DISABLE_VARIABLE]} switches the plugin off", "unset it")
    )
    return found
  if not _maxtext_imports(found):
    return found
  os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
  # Where the plugin was not loaded, that is the fault; missing fields and models would only repeat it.
  installed_parts = (_seams, _fields, _models) if plugin.REGISTRY.installed else (_seams,)
  found.checked = None if again else last_check.read()
  for step in (_start, *(() if found.checked else installed_parts), _backends):
    try:
      step(found)
    except Exception as error:
      found.faults.append(
        Issue(
          f"{step.__name__.strip('_')}: {type(error).__name__}: {error}", "repair what the text names, then run again"
        )
      )
  if found.seams and not any(seam["breaches"] for seam in found.seams) and found.ok:
    last_check.write()
  return found


def _versions() -> dict[str, Any]:
  def version(name: str) -> str | None:
    try:
      return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      return None

  return {
    "python": platform.python_version(),
    **{name: version(name) for name in _DISTRIBUTIONS},
    "tested maxtext": list(plugin.TESTED_MAXTEXT),
  }


def _maxtext_imports(found: Diagnosis) -> bool:
  """Whether MaxText and its dependencies can be imported at all."""
  try:
    import maxtext.configs.pyconfig  # noqa: F401  the configuration, hence jax, pydantic and omegaconf
  except ImportError as error:
    found.faults.append(Issue(f"MaxText does not import: {error}", INSTALL))
    return False
  return True


def _start(found: Diagnosis) -> None:
  records = [dataclasses.asdict(record) for record in discovery.plugins]
  found.start["plugins"] = records
  ours = [record for record in discovery.plugins if record.value == discovery.OWN_ENTRY.value]
  if not any(record.state == "loaded" for record in ours):
    reason = "; ".join(record.reason or "" for record in ours) or "no entry point was found"
    remedy = f"let {discovery.ALLOW_VARIABLE} name ling2, or unset it; else install maxtext-ling2 again"
    found.faults.append(Issue(f"the plugin is installed but not loaded: {reason}", remedy))
  for record in discovery.plugins:
    if record.state == "failed":
      remedy = f"repair or uninstall {record.distribution}; LING2 goes on without it"
      found.notes.append(Issue(f"plugin {record.name} failed: {record.reason}", remedy))
  copies = importlib.metadata.distributions(name="maxtext-ling2")
  installed = sorted({f"{copy.version} in {os.path.realpath(str(copy.locate_file('')))}" for copy in copies})
  if len(installed) > 1:
    remedy = "uninstall maxtext-ling2 until none is left, then install it once"
    found.notes.append(Issue(f"maxtext-ling2 is installed more than once: {', '.join(installed)}", remedy))
  if startup.found_by == "import":
    found.notes.append(
      Issue(
        "Python did not process maxtext_ling2.pth here, so `python -m maxtext...` does not know LING2",
        "use `python -m maxtext_ling2 run maxtext...`, or install the package into the environment",
      )
    )


def _seams(found: Diagnosis) -> None:
  registry = plugin.REGISTRY
  if registry.installed:
    registry.complete()
  every = _violations(registry)
  for seam in registry.seams:
    violations = [str(violation) for violation in every if violation.seam == seam.name]
    found.seams.append({"name": seam.name, "module": seam.module, "state": seam.state.value, "breaches": violations})
  tested = ", ".join(registry.tested)
  uses = {seam.name: seam.use for seam in registry.seams}
  for violation in every:
    remedy = (
      violation.hint if violation.hint != HINT else f"install a MaxText that this plugin was tested with ({tested})"
    )
    if (use := uses.get(violation.seam)) is not None:  # other runs work
      found.notes.append(Issue(f"{violation}; only runs with {use.setting} need it", f"{remedy}, or {use.instead}"))
    else:
      found.faults.append(Issue(str(violation), remedy))
  if registry.superseded_by is not None:
    found.notes.append(Issue(registry.superseded_by, "uninstall maxtext-ling2: MaxText needs it no longer"))
  if found.versions["maxtext"] not in registry.tested:
    text = f"MaxText {found.versions['maxtext']} was not tested with this plugin (tested: {tested})"
    found.notes.append(Issue(text, "compare numbers with `maxtext-ling2 verify` before you trust them"))


def _violations(registry: Registry) -> list[Violation]:
  """All violations: the registry stops at the first of a seam that all runs need, and undoes the others."""
  every = list(registry.violations)
  if every and not registry.usable:
    every += [violation for seam in registry.seams for violation in seam.violations() if violation not in every]
  return every + library_contract.violations()


def _fields(found: Diagnosis) -> None:
  from maxtext.configs import types

  from maxtext_ling2.host.seams.config_fields import ConfigFieldsSeam

  added = {name for seam in plugin.REGISTRY.seams if isinstance(seam, ConfigFieldsSeam) for name in seam.added}
  for field in FIELDS:
    if field.name in types.MaxTextConfig.model_fields:
      found.fields[field.name] = "maxtext-ling2" if field.name in added else "maxtext"
    elif plugin.REGISTRY.usable:
      found.faults.append(Issue(f"the config field {field.name} is missing", "install maxtext-ling2 again"))


def _models(found: Diagnosis) -> None:
  from maxtext_ling2.maxtext_api import session

  for name in sorted(set(plugin.MODEL_NAMES) - {CUSTOM_MODEL}):  # a custom model has no sizes of its own
    found.models[name] = _problem(functools.partial(session.make_config, model_name=name))
    if found.models[name] is not None:
      found.faults.append(Issue(f"model_name={name}: {found.models[name]}", "install maxtext-ling2 again"))


def _problem(call: Callable[[], Any]) -> str | None:
  """The error of a call in words, None if it has none."""
  try:
    call()
  except Exception as error:
    return f"{type(error).__name__}: {error}"
  return None


def _backends(found: Diagnosis) -> None:
  import jax

  from maxtext_ling2.ops.gla import api

  found.backends = {
    "platform": jax.default_backend(),
    "devices": [str(device) for device in jax.devices()],
    "gla": list(api.backends()),
  }
