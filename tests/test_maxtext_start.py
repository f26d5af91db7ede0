"""How our commands start MaxText: environment, refusals, settings of a platform. Imports no MaxText."""

import importlib.machinery

import pytest

from maxtext_ling2.maxtext_api import overrides, session, start


def test_the_users_environment_wins(monkeypatch):
  monkeypatch.delenv("DECOUPLE_GCLOUD", raising=False)
  start.set_environment()
  assert start.os.environ["DECOUPLE_GCLOUD"] == "TRUE"
  monkeypatch.setenv("DECOUPLE_GCLOUD", "FALSE")
  start.set_environment()
  assert start.os.environ["DECOUPLE_GCLOUD"] == "FALSE"


@pytest.mark.parametrize("code", [1, None, "text"])
def test_an_exit_of_maxtext_is_an_error_of_ours(code):
  printed = pytest.raises(start.ConfigError, match="refuses this configuration; its reason is printed above")
  with printed as error, start.refusals():
    raise SystemExit(code)
  assert isinstance(error.value, ValueError) and isinstance(error.value.__cause__, SystemExit)


@pytest.mark.parametrize("other", [KeyError("a"), ValueError("b"), KeyboardInterrupt()])
def test_other_errors_pass_unchanged(other):
  with pytest.raises(type(other)) as error, start.refusals():
    raise other
  assert error.value is other


def test_the_folder_of_maxtext(monkeypatch, tmp_path):
  found = importlib.machinery.ModuleSpec("maxtext", None, is_package=True)
  found.submodule_search_locations = [str(tmp_path)]
  monkeypatch.setattr(start.importlib.util, "find_spec", {"maxtext": found}.get)
  assert start.maxtext_folder() == tmp_path
  for none in (None, importlib.machinery.ModuleSpec("maxtext", None)):
    monkeypatch.setattr(start.importlib.util, "find_spec", {"maxtext": none}.get)
    with pytest.raises(start.NotInstalledError, match="MaxText is not installed; run: pip install"):
      start.maxtext_folder()


def test_only_a_cpu_has_settings_of_its_own():
  assert overrides.words(session.platform_settings("cpu")) == ["dtype=float32", "sparse_matmul=false"]
  assert session.platform_settings("gpu") == session.platform_settings("tpu") == {}
  session.platform_settings("cpu")["dtype"] = "bfloat16"  # a copy
  assert session.CPU_SETTINGS["dtype"] == "float32"
