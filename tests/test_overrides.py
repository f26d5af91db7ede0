"""KEY=VALUE words mean the same to our commands as to MaxText's command line; Python values survive as text."""

import subprocess
import sys
from pathlib import Path

import pytest

from maxtext_ling2.maxtext_api import overrides, session
from maxtext_ling2.maxtext_api.overrides import OverrideError


def test_parsed():
  assert overrides.split("run_name=a=b=c") == ("run_name", "a=b=c")
  assert overrides.split("steps") is overrides.split("=3") is overrides.split("") is None
  words = ["run_name=2024-01-01", "data_shuffle_seed=010", "jax_cache_dir=", "steps=1", "steps=2"]
  texts = {"run_name": "2024-01-01", "data_shuffle_seed": "010", "jax_cache_dir": "", "steps": "2"}
  assert overrides.parse(words) == texts
  assert overrides.join(texts) == [*words[:3], "steps=2"]


@pytest.mark.parametrize(
  ("word", "why"),
  [
    ("steps", r"'steps': not a setting of MaxText; write KEY=VALUE"),
    ("=3", r"'=3': not a setting of MaxText; write KEY=VALUE"),
    ("", r"'': not a setting of MaxText; write KEY=VALUE"),
    ("dtype=[", r"'dtype=\[': MaxText cannot read this value \(.*\); put quotes around it"),
    ("run_name={a: 1, a: 2}", r"MaxText cannot read this value \(.*duplicate key a.*\); put quotes"),
  ],
)
def test_refused_by_name(word, why):
  with pytest.raises(OverrideError, match=why):
    overrides.parse(["steps=3", word])


VALUES = [
  *(True, False, None, 3, 0.5, 1e-05, ["silu", "linear"], [1, 2], Path("/tmp/a b")),
  *(
    "",
    "plain",
    "010",
    "1e3",
    "2024-01-01",
    "true",
    "null",
    "~",
    "a: b",
    "a #b",
    " padded ",
    "[1",
    "it's",
    'say "x"',
    "ü",
  ),
  *("a=b", "/tmp/x:y", "line\nline", "tab\t", "gs://bucket/out", "-1", "0x10", "1:30", "{}", "*", "&a", "!x", "%"),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_python_values_survive(value):
  from omegaconf import OmegaConf

  (word,) = overrides.words({"key": value})
  read = OmegaConf.to_container(OmegaConf.from_dotlist([word]))["key"]
  assert read == (str(value) if isinstance(value, Path) else value) and type(read) is not Path


def test_text_of_python_values():
  settings = {"scan_layers": False, "steps": 3, "run_name": "a b", "tokenizer_path": "010", "jax_cache_dir": ""}
  expected = ["scan_layers=false", "steps=3", "run_name=a b", 'tokenizer_path="010"', 'jax_cache_dir=""']
  assert overrides.words(settings) == expected


COMMON = {
  **{key: value for key, value in session.TOOL_SETTINGS.items() if key != "run_name"},
  "base_output_directory": "/tmp/overrides",
}
AS_MAXTEXT = {
  "run_name=2024-01-01": "2024-01-01",
  "data_shuffle_seed=010": 8,
  "jax_cache_dir=": None,
  "run_name='010'": "010",
  "run_name=a=b=c": "a=b=c",
  "run_name= padded ": "padded",
  'run_name="a #b"': "a #b",
  "run_name=a #b": "a",
  "run_name=12:30:45x": "12:30:45x",
  "mlp_activations=[silu,linear]": ["silu", "linear"],
  "learning_rate=1e-3": 1e-3,
  "steps=1_000": 1000,
  "enable_dropout=no": False,
  "hf_train_files=": None,
  "run_name=010": "valid string",
  "mlp_activations=silu": "valid list",
  "no_such_field=1": "no_such_field",
}


@pytest.mark.parametrize("word", AS_MAXTEXT)
def test_as_maxtexts_own_command_line(word):
  """The same words, parsed by MaxText alone as its commands do: with an argv."""
  from maxtext.configs import pyconfig

  argv = ["", f"{pyconfig.MAXTEXT_CONFIGS_DIR}/base.yml", *overrides.words(COMMON), word]
  (key,), expected = overrides.parse([word]), AS_MAXTEXT[word]
  results = []
  for initialize in (lambda: pyconfig.initialize(argv), lambda: session.make_config(**COMMON, overrides=[word])):
    try:
      results.append(getattr(initialize(), key))
    except ValueError as error:
      results.append(str(error))
  stock, ours = results
  assert ours == stock
  assert stock == expected or (isinstance(expected, str) and expected in stock)


def test_words_win():
  config = session.make_config(
    overrides=["run_name=2024-01-01", "steps=3", "steps=010", "dtype=float16"], steps=5, dtype="float32"
  )
  assert (config.run_name, config.steps, str(config.dtype)) == ("2024-01-01", 8, "float16")
  assert config.scan_layers is False  # of the tools' own settings


def test_light():
  """Neither JAX nor MaxText are imported with it."""
  code = "import maxtext_ling2.maxtext_api.overrides as o, sys; o.parse(['a=1'])"
  code += "; print(sorted({'jax', 'maxtext'} & set(sys.modules)))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stdout.strip() == "[]", done.stderr
