"""A base yml of the user's against the model's: it wins where it says so, and is refused where it would be dropped."""

import re
from pathlib import Path

import pytest

import tiny  # noqa: F401  MaxText's environment

RECIPE = "base_config: base.yml\noverride_model_config: true\nscan_layers: true\nmlp_activations: [gelu, linear]\n"


def load(yml, *words, **kwargs):
  from maxtext.configs import pyconfig

  return pyconfig.initialize_pydantic(["", str(yml), "model_name=ling2", *words], **kwargs)


@pytest.fixture
def write(tmp_path):
  def write(text, name="recipe.yml"):
    file = tmp_path / name
    file.write_text(text)
    return file

  return write


def test_a_base_yml_wins_over_the_models_where_it_says_so(write):
  config = load(write(RECIPE + "steps: 7\n"))
  assert config.scan_layers is True and config.mlp_activations == ["gelu", "linear"] and config.steps == 7
  assert config.max_target_length == 4096  # ling2.yml's


def test_so_does_one_that_inherits(write):
  write(RECIPE)
  assert load(write("base_config: recipe.yml\nmax_target_length: 2048\n", "heir.yml")).max_target_length == 2048


@pytest.mark.parametrize("how", ["word", "keyword", "variable"])
def test_the_command_line_wins_over_both(write, how, monkeypatch):
  yml = write(RECIPE)
  if how == "variable":
    monkeypatch.setenv("M_SCAN_LAYERS", "false")
  words = ["scan_layers=false"] if how == "word" else []
  assert load(yml, *words, **({"scan_layers": False} if how == "keyword" else {})).scan_layers is False


@pytest.mark.parametrize(
  "text",
  ["scan_layers: true\n", "override_model_config: false\nscan_layers: true\n"],
)
def test_without_saying_so_it_is_refused_by_name(write, text):
  with pytest.raises(ValueError, match=r"scan_layers: True \(False in ling2\.yml\).*`override_model_config: true`"):
    load(write("base_config: base.yml\n" + text))


def test_a_word_can_say_so(write):
  assert load(write("base_config: base.yml\nscan_layers: true\n"), "override_model_config=true").scan_layers is True


def test_the_same_value_is_no_contradiction(write):
  assert load(write("base_config: base.yml\nscan_layers: false\n")).scan_layers is False


def test_a_copy_of_maxtexts_base_yml(tmp_path):
  """Of a copy only the lines that were changed are the user's; so with a path through a link."""
  from maxtext.configs import pyconfig

  stock = Path(pyconfig.MAXTEXT_CONFIGS_DIR, "base.yml")
  copy = tmp_path / "base.yml"
  copy.write_text(stock.read_text())
  config = load(copy)
  assert (config.base_emb_dim, config.scan_layers, config.wi_tile_fwd_batch_seq) == (2048, False, 0)
  copy.write_text(re.sub("^wi_tile_fwd_batch_seq: 512$", "wi_tile_fwd_batch_seq: 256", stock.read_text(), flags=re.M))
  assert load(copy).wi_tile_fwd_batch_seq == 256
  copy.write_text(re.sub("^base_emb_dim: .*$", "base_emb_dim: 64", stock.read_text(), flags=re.M))
  with pytest.raises(ValueError, match="base_emb_dim: 64"):
    load(copy)
  (tmp_path / "link").symlink_to(stock.parent)
  assert load(tmp_path / "link" / "base.yml").wi_tile_fwd_batch_seq == 0


def test_ymls_that_are_written_otherwise(write):
  flow = "{base_config: base.yml, override_model_config: true, scan_layers: true, wi_tile_fwd_batch_seq: 256}\n"
  config = load(write(flow))
  assert (config.scan_layers, config.wi_tile_fwd_batch_seq) == (True, 256)


def test_values_that_refer_to_others(write):
  text = "base_config: base.yml\nmax_prefill_predict_length: ${max_target_length}\n"
  assert load(write(text)).max_prefill_predict_length == 4096  # no contradiction: ling2.yml's own
  text += "override_model_config: true\nmax_target_length: 1024\n"
  assert load(write(text)).max_prefill_predict_length == 1024


def test_a_variable_does_not_say_so_in_time(write, monkeypatch):
  """MaxText applies M_* after it has merged the ymls."""
  monkeypatch.setenv("M_OVERRIDE_MODEL_CONFIG", "true")
  with pytest.raises(ValueError, match="add `override_model_config: true`"):
    load(write("base_config: base.yml\nscan_layers: true\n"))
