"""The configuration class of an export and our import refuse the same config.json files. It needs no PyTorch."""

import copy
import importlib.util
import json
import sys

import pytest
import transformers
from folders import GOLDEN
from transformers import AutoConfig, dynamic_module_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from maxtext_ling2.checkpoint import exported_code, hf_config, hf_keys
from maxtext_ling2.errors import CheckpointError

pytestmark = pytest.mark.unit

LEFT_TO_TRANSFORMERS = (
  *("quantization_config", "quantization", "compression_config", "pruned_heads", "chunk_size_feed_forward"),
  *("is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder"),
  hf_keys.GUARD_KEY,  # the class takes the guard out; another name is a weight file, which transformers opens
)
COMPUTED = ("attention_dropout",)
"""Keys of which the PyTorch code has more than LING2."""
CHECKED = sorted(set(hf_keys.ONLY) - {*LEFT_TO_TRANSFORMERS, *COMPUTED})

YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 64,
  "beta_fast": 8.0,
  "beta_slow": 1.0,
  "mscale": 1.0,
  "mscale_all_dim": 0.7,
}
ON_TOP = {"rope_theta": 600000.0, "partial_rotary_factor": 0.5}
LAYOUTS = {"plain": {}, "YaRN": {"rope_scaling": YARN}, "YaRN in both layouts": {"rope_parameters": YARN | ON_TOP}}


def _load():
  spec = importlib.util.spec_from_file_location("exported_configuration", exported_code.FOLDER / exported_code.FILES[0])
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


exported = _load()


def golden(**changes):
  return hf_config.read(GOLDEN / "one_cycle") | {"gla_decay_layer_offset": 1, **exported_code.keys(), **changes}


def refusals(config):
  """What (the class, the import) say against a config.json; None: nothing."""
  found = []
  for read, error in (
    (lambda c: exported.BailingMoeV2_5Config(**c), ValueError),
    (hf_config.to_maxtext, CheckpointError),
  ):
    try:
      read(json.loads(json.dumps(config)))
      found.append(None)
    except error as refused:
      found.append(str(refused))
  return found


def other_than(allowed):
  """A value of the same kind that is none of the allowed ones."""
  first = allowed[0]
  if isinstance(first, bool):
    return not first
  return {str: f"{first}_2", int: 1, type(None): 1}[type(first)]


def test_there_is_enough_to_check():
  assert len(CHECKED) >= 30 and {*LEFT_TO_TRANSFORMERS, *COMPUTED} <= hf_keys.ONLY.keys()


@pytest.mark.parametrize("key", CHECKED)
def test_keys_of_one_value(key):
  wrong = other_than(hf_keys.ONLY[key])
  for refused in refusals(golden(**{key: wrong})):
    assert refused.startswith(f"{key}={wrong!r}: not ")
  for right in hf_keys.ONLY[key]:
    assert refusals(golden(**{key: right})) == [None, None]


@pytest.mark.parametrize("key", [*hf_keys.EQUAL, *hf_keys.ONE_OF])
def test_keys_that_follow_from_others(key):
  table = hf_keys.EQUAL if key in hf_keys.EQUAL else hf_keys.ONE_OF
  value = table[key][1](golden())
  allowed = [value] if key in hf_keys.EQUAL else list(value)
  wrong = ["linear_attention"] if isinstance(value, list) else 7
  for refused in refusals(golden(**{key: wrong})):
    assert refused.startswith(f"{key}={wrong!r}: not ")
  for right in (*allowed, None):
    assert refusals(golden(**{key: right})) == [None, None]


@pytest.mark.parametrize("key", ["kda_num_heads", "linear_attn_config", "short_conv_kernel_size", "linear_num_key_heads"])
def test_keys_of_another_linear_attention(key):
  for refused in refusals(golden(**{key: 4})):
    assert refused.startswith(f"{key}=4: a key of another linear attention")


@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
  "rope",
  [
    {"factor": 4},
    {"type": "default", "factor": 4},
    {"rope_type": "linear", "factor": 4},
    YARN | {"type": "default"},
    YARN | {"rope_theta": 10000.0},
    YARN | {"partial_rotary_factor": 0.25},
    YARN | {"short_factor": 1.0},
    YARN | {"mscale": -1.0},
    YARN | {"mscale_all_dim": -1.0},
    YARN | {"truncate": 1},
    YARN | {"factor": True},
    YARN | {"original_max_position_embeddings": 0.5},
    [YARN],
    "yarn",
    0,
    True,
  ],
  ids=str,
)
def test_rotary_embeddings(layout, rope):
  assert None not in refusals(golden(**{layout: rope}))


CONTRADICTIONS = [
  ({"rope_scaling": YARN, "rope_parameters": ON_TOP | {"rope_type": "default"}}, ["rope_scaling.rope_type='yarn'"]),
  ({"rope_scaling": YARN, "rope_parameters": ON_TOP}, ["rope_parameters.rope_type='default'"]),
  ({"rope_scaling": {"type": "default"}, "rope_parameters": YARN}, ["rope_parameters.rope_type='yarn'"]),
  ({"rope_parameters": {"rope_theta": 5.0}}, ["rope_theta=600000.0", "rope_parameters.rope_theta=5.0"]),
  ({"rope_parameters": YARN | {"partial_rotary_factor": 0.25}}, ["rope_parameters.partial_rotary_factor=0.25"]),
  ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}, ["rope_scaling.factor=4.0", "factor=2.0"]),
  ({"rope_scaling": YARN, "rope_parameters": YARN | {"truncate": False}}, ["rope_parameters.truncate=False"]),
  ({"linear_silu": True, "use_linear_silu": False}, ["linear_silu=True, use_linear_silu=False"]),
]


@pytest.mark.parametrize(("changes", "named"), CONTRADICTIONS)
def test_contradictions(changes, named):
  for refused in refusals(golden(**changes)):
    assert all(name in refused for name in named)


ODD = [None, True, -1, 0, 0.5, 10**400, 1e308, 5e-324, float("nan"), float("inf"), "x", "", [], [1], {}, {"a": 1}]
OURS_ALONE = ("rope_theta", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
"""MaxText's fields of these are integers, and transformers 4 and 5 disagree where the lengths do not fit the factor."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_values_are_refused_by_both_or_none(layout):
  """Or by the import alone, where MaxText cannot have it, or a null or absent key takes the class's default."""
  changes = copy.deepcopy(LAYOUTS[layout])
  config, tried, refused_by_both = golden(**changes), 0, 0
  for place in (config, *changes.values()):
    for key, kept in list(place.items()):
      if place is config and key not in {*hf_keys.SAME, *hf_keys.TRANSLATED, *CHECKED}:
        continue
      for value in ODD:
        place[key], tried = value, tried + 1
        by_class, by_import = refusals(config)
        default = value is None and key in ("partial_rotary_factor", "rope_theta")
        assert bool(by_class) == bool(by_import) or (by_import and (key in OURS_ALONE or default)), (
          key,
          value,
          by_import,
        )
        refused_by_both += bool(by_class)
      place[key] = kept
  assert refused_by_both / tried > 0.6 and tried > 500


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Writes a folder as an export does, without weights; the code is run from a place of the test's own."""
  monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
  monkeypatch.setattr(sys, "path", list(sys.path))  # it is put there

  def write(**changes):
    hf = tmp_path / f"hf_{tmp_path.name}"  # a part of the module's name
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(golden(**changes)))
    exported_code.write(hf)
    return hf

  return write


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_opened_and_saved_by_transformers(folder, tmp_path, changes):
  hf = folder(**changes)
  config = AutoConfig.from_pretrained(hf, trust_remote_code=True)
  assert type(config).__name__ == "BailingMoeV2_5Config" and type(config).__module__.startswith("transformers_modules")
  written = golden()
  for key in ("hidden_size", "num_hidden_layers", "num_experts", "kv_lora_rank", "v_head_dim", "vocab_size"):
    assert getattr(config, key) == written[key]
  assert not hasattr(config, hf_keys.GUARD_KEY)
  assert (config.rope_theta, config.partial_rotary_factor) == (600000.0, 0.5)
  assert (config.rope_scaling or {}).get("factor") == (4.0 if changes else None)
  config.save_pretrained(tmp_path / "again")
  again = hf_config.read(tmp_path / "again")
  for key in (*exported_code.keys(), "architectures", "model_type", "gla_decay_layer_offset"):
    assert again[key] == written[key]
  assert hf_config.to_maxtext(again) == hf_config.to_maxtext(hf_config.read(hf))
  assert hf_config.to_maxtext(again)["rope_type"] == ("yarn" if changes else "default")


@pytest.mark.skipif("bailing_hybrid" not in CONFIG_MAPPING, reason="transformers before 5.20 has no bailing_hybrid")
def test_without_trust_it_is_ling_3(folder):
  """Which is why the guard is there: with weights, loading ends at the file that it names."""
  config = AutoConfig.from_pretrained(folder())
  assert type(config) is transformers.BailingHybridConfig
  assert config.transformers_weights == exported_code.keys()[hf_keys.GUARD_KEY]
