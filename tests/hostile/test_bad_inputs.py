"""Bad inputs, one table: each is refused with its name and a way out, before anything compiles, and nothing is written.

A case is a group, a name and an attempt, which returns the exit code and the text that a user gets.
"""

import dataclasses
import logging
import os
import re
import shlex
import sys
import types
from pathlib import Path

import omegaconf
import pytest
from etils import epath

from checkpoint import folders
from hostile import bad_commands, bad_folders, bad_settings
from maxtext_ling2 import cli
from maxtext_ling2.checkpoint.import_hf import Import
from maxtext_ling2.configs import validation
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.maxtext_api import session

pytestmark = pytest.mark.hostile
PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


@dataclasses.dataclass(frozen=True)
class Case:
  """Something wrong, how to try it, and the exit code and words that must come of it."""

  group: str
  name: str
  attempt: object
  words: tuple[str, ...]
  code: int = 2

  def __str__(self):
    return f"{self.group}: {self.name}"


@dataclasses.dataclass
class Place:
  """The folder in which attempts are made, with everything that a run could write into, and tools of the attempts."""

  folder: object
  monkeypatch: pytest.MonkeyPatch
  capsys: pytest.CaptureFixture
  configs: dict
  log: list

  def files(self):
    found = sorted(self.folder.rglob("*"))
    return [(path, path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns) for path in found]


# Rules


def rule(changes):
  def attempt(place):
    settings = place.configs["ling2"]
    assert set(changes) <= set(settings)
    with pytest.raises(ValueError) as error:
      validation.validate(types.SimpleNamespace(**{**settings, **changes}))
    lines, field = str(error.value).splitlines(), next(iter(changes))
    return 2, next(line for line in [*(one for one in lines if one.startswith(field)), *lines] if f"{field}=" in line)

  return attempt


def rule_words(changes, way_out):
  field, value = next(iter(changes.items()))
  # Enums and switches are spelled as in a yml.
  shown = (
    str(value).lower()
    if field in ("context_parallel_load_balance", "mla_naive_kvcache", "enable_streaming_diloco", "use_qk_clip")
    else str(value)
  )
  quoted = isinstance(value, str) and field not in ("attention_type", "shard_mode", "attention", "dtype", "weight_dtype")
  return f"{field}={shown!r}" if quoted else f"{field}={shown}", way_out


# Settings, by MaxText's own way to end a process


def initialize(place, *argv):
  """MaxText's initialize, which ends the process where it does not see a test framework."""
  from maxtext.configs import pyconfig

  with place.monkeypatch.context() as patch:
    for framework in ("pytest", "unittest"):
      patch.delitem(sys.modules, framework, raising=False)
    try:
      pyconfig.initialize(["", *argv, "skip_jax_distributed_system=true"])
    except SystemExit as error:
      return error.code, "\n".join(place.log)
  return 0, "accepted"


def words(*given):
  override = "override_model_config=true"
  return lambda place: initialize(place, str(place.configs["slim"]), "model_name=ling2-tiny", override, *given)


def model(name):
  return lambda place: initialize(place, str(place.configs["slim"]), f"model_name={name}")


def variable(text):
  def attempt(place):
    place.monkeypatch.setenv(*text.split("=", 1))
    return words()(place)

  return attempt


def yml(text):
  def attempt(place):
    place.configs["bad"].write_text(text)
    return initialize(place, str(place.configs["bad"]))

  return attempt


def field_and_value(text):
  field, _, value = bad_settings.split(text)[0].partition("=")
  return field.strip("-"), value


# Folders and commands


def folder(damage):
  def attempt(place):
    with pytest.raises(CheckpointError) as error:
      Import(place.configs["damaged"], place.configs["one_cycle"], epath.Path(place.folder / "mt" / "0"), "float32")
    return 1, str(error.value)

  attempt.damage = damage
  return attempt


def command(line):
  def attempt(place):
    tokenizer = str(place.configs["tokenizer"])
    argv = [tokenizer if word == "TOKENIZER" else word for word in shlex.split(line)]
    place.monkeypatch.setattr(sys, "argv", ["maxtext-ling2", *argv])
    with pytest.raises(SystemExit) as ended:
      cli.main()
    printed = place.capsys.readouterr()
    assert printed.out == "", "results come before the error"
    code, text = ended.value.code, " ".join((printed.err).split()).lower()
    return (1, " ".join(code.split()).lower()) if isinstance(code, str) else (code, text)

  return attempt


CASES = [
  *(Case("rule", str(changes), rule(changes), rule_words(changes, way)) for changes, way in bad_settings.RULES),
  *(
    Case("setting", text, words(*bad_settings.split(text)), (*field_and_value(text), way))
    for text, way in bad_settings.SETTINGS.items()
  ),
  *(Case("model name", name, model(name), (f"model_name={name}", way)) for name, way in bad_settings.MODELS.items()),
  *(
    Case("misspelt field", typo, words(f"{typo}=1"), (f"{typo}=1", f"did you mean '{right}'"))
    for typo, right in bad_settings.TYPOS.items()
  ),
  *(
    Case("variable", text, variable(text), (field_and_value(text)[0][2:].lower(), field_and_value(text)[1], way))
    for text, way in bad_settings.VARIABLES.items()
  ),
  *(Case("yml", text, yml(text), tuple(expected)) for text, expected in bad_settings.YMLS.items()),
  *(Case("folder", name, folder(damage), tuple(expected), 1) for name, (damage, expected) in bad_folders.FILES.items()),
  *(
    Case("command", line, command(line), tuple(expected), code)
    for line, (code, expected) in bad_commands.COMMANDS.items()
  ),
]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
  """What the attempts share: two good configs, a tokenizer, a base yml, and the prepared folder."""
  from maxtext.trainers.pre_train import train_compile  # noqa: F401  prints while it is imported

  from maxtext_ling2.demo import data

  home = tmp_path_factory.mktemp("place")
  place = home / "place"
  place.mkdir()
  bad_commands.prepare(place)
  (home / "slim.yml").write_text(bad_settings.SLIM)
  return {
    "ling2": dict(session.make_config(model_name="ling2").get_keys()),
    "one_cycle": folders.config(folders.GOLDEN / "one_cycle"),
    "tokenizer": data.tokenizer_file(),
    "slim": home / "slim.yml",
    "bad": home / "bad.yml",
    "place": place,
  }


@pytest.fixture(scope="module")
def compiled():
  """A list that grows with each program that XLA compiles or takes from its cache."""
  import jax

  events = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: events.append(event) if event.startswith("/jax/core/compile/") else None
  )
  return events


@pytest.fixture
def place(configs, monkeypatch, capsys):
  folder, log = configs["place"], []
  monkeypatch.chdir(folder)
  monkeypatch.setattr(os, "environ", os.environ)
  for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
    monkeypatch.setenv(name, str(folder))
  for name in ("XLA_FLAGS", "JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
    monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what a command sets is taken back
  handler = logging.Handler()
  handler.emit = lambda record: log.append(record.getMessage())
  logging.getLogger("absl").addHandler(handler)
  yield Place(folder, monkeypatch, capsys, configs, log)
  logging.getLogger("absl").removeHandler(handler)


@pytest.fixture
def base_yml_once(monkeypatch):
  """MaxText parses its 1,200 lines of base.yml anew for each config."""
  load = omegaconf.OmegaConf.load

  def cached(file, *args):
    if os.path.basename(str(file)) != "base.yml":
      return load(file, *args)
    if not BASE:
      BASE.append(load(file, *args))
    return BASE[0].copy()

  monkeypatch.setattr(omegaconf.OmegaConf, "load", cached)


BASE = []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused(case, place, base_yml_once, compiled, tmp_path):
  if case.group == "folder":
    place.configs["damaged"] = folders.copy(tmp_path / "hf")
    case.attempt.damage(place.configs["damaged"])
  before, programs = place.files(), len(compiled)
  code, text = case.attempt(place)
  assert code == case.code, text
  for word in case.words:
    assert word.lower() in text.lower(), text  # true or True
  assert "Traceback" not in text
  assert place.files() == before
  assert compiled[programs:] == []


def test_the_page_of_errors_counts_them():
  assert len({str(case) for case in CASES}) == len(CASES)
  assert re.findall(r"(\d+) bad inputs", PAGE.read_text()) == [str(len(CASES))]
