"""Settings -> config.json -> settings loses nothing that changes what the model computes: tried on every field it reads.

Each field that is read while a tiny model is built and traced is changed alone (`setting_cases.py`). Then the config or
the export refuses it by name, or a model with the settings of the exported config.json computes the same. What became of
every value, and why a field could not be changed: `pytest -rP tests/checkpoint/test_every_setting.py`.
"""

import sys
import warnings

import pytest
import setting_cases as cases

from maxtext_ling2.checkpoint import hf_config


@pytest.fixture(scope="module")
def survey():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # thousands, about what Flax and MaxText deprecate
    return cases.Survey().run()


@pytest.fixture(scope="module")
def single():
  """Judges single settings; it has looked at none yet."""
  return cases.Survey()


def listed(survey, *outcomes):
  return "\n".join(str(case) for case in survey.cases if case.outcome in outcomes)


@pytest.mark.slow  # all fields: five minutes
def test_nothing_is_lost(survey):
  assert not survey.of(*cases.BAD), listed(survey, *cases.BAD)


@pytest.mark.slow  # all fields: five minutes
def test_enough_fields_were_changed(survey, capsys):
  counts = ", ".join(f"{len(survey.of(outcome))} {outcome}" for outcome in cases.OUTCOMES)
  changed, refused = survey.of(*cases.HELD), survey.of(cases.CONFIG)
  never = survey.reads - changed - refused
  print("\n".join(map(str, survey.cases)))
  with capsys.disabled():  # on standard error, which xdist's workers pass on
    print(
      f"\nevery setting: {len(survey.reads)} fields read, {len(changed)} changed, {len(refused - changed)} refused by "
      f"the config whatever the value, {len(never)} could not be changed here\nfields by outcome: {counts}",
      file=sys.stderr,
    )
  assert len(changed) >= 60
  assert not survey.of(cases.NO_VALUE), f"add values to setting_cases.VALUES for {survey.of(cases.NO_VALUE)}"


@pytest.mark.slow
@pytest.mark.parametrize(
  "field",
  ["base_mlp_dim", "num_experts_per_tok", "rope_max_timescale", "use_linear_silu", "rope_mscale_all_dim", "beta_fast"],
)
def test_is_carried(survey, field):
  assert field in survey.of(cases.CARRIED)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["learning_rate", "steps"])
def test_is_not_read(survey, field):
  assert field not in survey.reads


@pytest.mark.slow
@pytest.mark.parametrize("field", ["moe_z_loss_weight", "scan_layers", "per_device_batch_size"])
def test_has_no_effect(survey, field):
  assert survey.of(cases.NO_EFFECT) >= {field}


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("attn_logits_soft_cap", 30.0),
    ("final_logits_soft_cap", 30.0),
    ("logits_via_embedding", True),
    ("mlp_activations", ["gelu", "linear"]),
    ("rope_min_timescale", 2),
    ("trainable_position_size", 32),
  ],
)
def test_is_refused(single, field, value):
  case, _ = single.judge(field, value)
  assert case.outcome in (cases.CONFIG, cases.EXPORT), case


def test_another_rotary_embedding_is_refused_at_once(single):
  case, _ = single.judge("rope_type", "llama3.1")
  assert case.outcome == cases.CONFIG


def test_no_groups_are_one_group(single):
  case, _ = single.judge("n_routing_groups", -1)
  assert case.outcome == cases.CARRIED


def test_dropped_tokens_are_refused(single):
  case, _ = single.judge("capacity_factor", 1.0, {"sparse_matmul": False})
  assert case.outcome in (cases.CONFIG, cases.EXPORT), case


def forgets(config):
  """An export that writes LING2's usual scale whatever the model's is."""
  return {**hf_config.from_maxtext(config), "routed_scaling_factor": 2.5}


def leaves_out(config):
  """An export that does not write the scale."""
  exported = hf_config.from_maxtext(config)
  del exported["routed_scaling_factor"]
  return exported


@pytest.mark.parametrize("export", [forgets, leaves_out])
def test_an_export_that_loses_something_is_found(single, export):
  case, _ = single.judge("routed_scaling_factor", 5.0, export=export)
  assert case.outcome == cases.LOST
  assert single.judge("routed_scaling_factor", 5.0)[0].outcome == cases.CARRIED
