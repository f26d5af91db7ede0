"""Where MaxText is installed, as a process finds it that does not import it."""

import importlib.util

import maxtext
import pytest

from maxtext_ling2.maxtext_api.start import NotInstalledError, maxtext_folder


def test_it_is_the_folder_that_python_imports():
  assert [str(maxtext_folder())] == list(maxtext.__path__)
  assert (maxtext_folder() / "configs" / "base.yml").is_file()


def test_a_missing_maxtext_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(NotInstalledError, match=r"MaxText is not installed; run: pip install 'maxtext-ling2\[tpu\]'"):
    maxtext_folder()
