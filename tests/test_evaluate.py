"""Which decay offset the weights were trained with: in closed form, and of a model on texts that it wrote itself."""

import json
import math
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from maxtext_ling2.checkpoint import decay_offset
from maxtext_ling2.cli import app
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.inference import compare_offsets, evaluate, saved_model
from maxtext_ling2.inference.compare_offsets import OffsetComparison
from maxtext_ling2.inference.evaluate import Score
from maxtext_ling2.inference.saved_model import SavedModelError
from maxtext_ling2.verify.model import Float32Model
from test_generate import GOLDEN, Letters

LENGTH, WINDOWS = 32, 16
COUNT = LENGTH * WINDOWS


# Closed form


def comparison(zero, one, error=0.1, blocks=32, entropy=5.0, stated=None):
  return OffsetComparison((Score(zero * 100, 100, 100), Score(one * 100, 100, 100)), error, blocks, entropy, stated)


@pytest.mark.parametrize(
  ("found", "lower", "why"),
  [
    (comparison(2.0, 2.5), 0, None),
    (comparison(2.5, 2.0), 1, None),
    (comparison(2.0, 2.4 + 1e-9), 0, None),
    (comparison(2.0, 2.39), 0, "the difference is less than 4 standard errors; take a longer text"),
    (comparison(2.0, 2.0), 0, "less than 0.05 nats"),
    (comparison(2.049, 2.0, error=1e-4), 1, "the difference is less than 0.05 nats per token"),
    (comparison(2.051, 2.0, error=1e-4), 1, None),
    (comparison(2.0, 2.0, error=0.0), 0, "less than 0.05 nats"),
    (comparison(5.0, 9.0), 0, "neither loss is below 5.0000, which token frequencies alone reach"),
    (comparison(4.99, 9.0), 0, None),
    (comparison(2.0, 2.5, blocks=7), 0, "it has 100 scored tokens, and 128 are needed"),
    (comparison(2.0, math.nan), 0, "not a finite number"),
    (comparison(math.inf, 2.0), 1, "not a finite number"),
  ],
)
def test_decision(found, lower, why):
  assert found.lower == lower
  if why is None:
    assert found.undecided is None
    assert compare_offsets.verdict(found)[1] == f"The weights were trained with gla_decay_layer_offset={lower}."
  else:
    assert why in found.undecided
    text = compare_offsets.verdict(found)[1]
    assert text == f"This text cannot tell which gla_decay_layer_offset the weights were trained with: {found.undecided}."


def test_report():
  first, _, last = compare_offsets.verdict(comparison(2.5, 2.0, stated=0))
  assert first == (
    "difference (1 minus 0): -0.5000 nats per token, standard error 0.1000 (32 blocks); token frequencies alone: 5.0000 "
    "nats per token"
  )
  assert last == "config.json says gla_decay_layer_offset=0, which contradicts the loss."
  assert compare_offsets.verdict(comparison(2.5, 2.0, stated=1))[2:] == ["config.json says gla_decay_layer_offset=1."]
  assert compare_offsets.verdict(comparison(2.5, 2.5, stated=1))[2:] == ["config.json says gla_decay_layer_offset=1."]
  assert len(compare_offsets.verdict(comparison(2.5, 2.0))) == 2


def test_paired_error():
  """That of the mean of independent differences; blocks keep it right where neighbours are alike."""
  rng = np.random.default_rng(0)
  hard, noise = rng.uniform(0, 10, 32 * 64), rng.standard_normal(32 * 64)
  error, blocks = compare_offsets.paired_error(hard.astype(np.float32), (hard + noise).astype(np.float32))
  assert blocks == 32 and error == pytest.approx(1 / math.sqrt(noise.size), rel=0.25)
  alike = np.repeat(noise[:32], 64)
  error, _ = compare_offsets.paired_error(hard.astype(np.float32), (hard + alike).astype(np.float32))
  assert error == pytest.approx(np.std(noise[:32], ddof=1) / math.sqrt(32), rel=1e-3)
  short = np.zeros(31, np.float32)
  assert compare_offsets.paired_error(short, short) == (math.inf, 1)
  assert compare_offsets.paired_error(np.zeros(127, np.float32), np.ones(127, np.float32)) == (0.0, 7)


def test_frequency_entropy():
  assert compare_offsets.frequency_entropy(np.array([3, 3, 9, 9], np.int32)) == pytest.approx(math.log(2))
  assert compare_offsets.frequency_entropy(np.array([3, 3, 3], np.int32)) == 0.0
  assert compare_offsets.frequency_entropy(np.array([1, 1, 2, 3], np.int32)) == pytest.approx(1.5 * math.log(2))


# A model


@pytest.fixture(autouse=True)
def letters(monkeypatch):
  monkeypatch.setattr(saved_model, "_tokenizer", lambda path: Letters())


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
  """A folder whose model is sure of what it says, as a trained one is: its logits are six times those of a golden one."""
  folder = tmp_path_factory.mktemp("sure") / "hf"
  shutil.copytree(GOLDEN / "one_cycle", folder)
  tensors = load_file(folder / "model.safetensors")
  save_file(tensors | {"lm_head.weight": 6 * tensors["lm_head.weight"]}, folder / "model.safetensors")
  return folder


@pytest.fixture(scope="module")
def written(sure):
  """{offset: token ids [COUNT + 1] that the model wrote with it}, in windows of which each sees its own tokens alone."""
  import jax

  found = {}
  for offset in (0, 1):
    model, rng = Float32Model(sure, WINDOWS, LENGTH, gla_decay_layer_offset=offset), np.random.default_rng(offset)
    graph, state = model.split()
    call = jax.jit(lambda state, ids, model=model, graph=graph: model.run(graph, state, ids, 1 + 0 * ids)[0])
    starts = rng.integers(model.config.vocab_size, size=WINDOWS + 1)
    rows = np.zeros((WINDOWS, LENGTH), np.int32)
    rows[:, 0] = starts[:-1]
    for position in range(1, LENGTH):
      with model.context():
        logits = np.asarray(call(state, rows))[:, position - 1]
      rows[:, position] = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
    found[offset] = np.append(rows.reshape(-1), starts[-1])
  return found


def text_of(ids):
  return Letters().decode(ids)


def state_offset(folder, target, offset):
  shutil.copytree(folder, target)
  config = json.loads((target / "config.json").read_text())
  (target / "config.json").write_text(json.dumps(config | {"gla_decay_layer_offset": offset}))
  return target


@pytest.mark.parametrize("offset", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_offset_that_wrote_a_text_is_found(sure, written, offset, monkeypatch):
  opened = []
  original = saved_model._weights_of
  monkeypatch.setattr(saved_model, "_weights_of", lambda *args: opened.append(args) or original(*args))
  text = text_of(written[offset])
  found = compare_offsets.compare_offsets(sure, text, length=LENGTH)
  assert found.undecided is None and found.lower == offset
  assert len(opened) == 1
  assert found.scores[0].tokens == COUNT and found.blocks == 32
  right, wrong = (found.scores[k].loss for k in (offset, 1 - offset))
  assert right + 0.1 < wrong and right < found.frequency_entropy
  given = {"decay_offset": 1} if offset else {"overrides": ["gla_decay_layer_offset=1"]}
  assert evaluate.evaluate(sure, text, length=LENGTH, **given).nats == pytest.approx(found.scores[1].nats, rel=1e-6)


@pytest.mark.slow
def test_cannot_tell(sure, written):
  """Random weights on a text that nobody wrote: of small logits the losses are alike, of large ones both are bad."""
  text = text_of(np.arange(COUNT) * 7 % 380)
  found = compare_offsets.compare_offsets(GOLDEN / "one_cycle", text, length=LENGTH)
  assert "the difference is less than 0.05 nats per token" in found.undecided
  found = compare_offsets.compare_offsets(sure, text, length=LENGTH)
  assert min(score.loss for score in found.scores) > found.frequency_entropy and found.undecided is not None
  found = compare_offsets.compare_offsets(sure, text_of(written[0][:100]), length=LENGTH)
  assert "it has 99 scored tokens, and 128 are needed" in found.undecided


@pytest.mark.slow
def test_command(sure, written, tmp_path):
  file = tmp_path / "text"
  file.write_bytes(text_of(written[1]).encode())
  monkey = ["eval", str(sure), "--text", str(file), "--length", str(LENGTH)]
  done = CliRunner().invoke(app, [*monkey, "--decay-offset", "both"])
  assert done.exit_code == 0, done.output
  zero, one, count, numbers, verdict = done.stdout.splitlines()
  assert zero.startswith("gla_decay_layer_offset=0: loss ") and one.startswith("gla_decay_layer_offset=1: loss ")
  assert count.startswith(f"{COUNT} tokens, ") and "standard error" in numbers and "(32 blocks)" in numbers
  assert verdict == "The weights were trained with gla_decay_layer_offset=1."
  done = CliRunner().invoke(app, [*monkey, "--decay-offset", "1"])
  assert done.exit_code == 0 and done.stdout.splitlines()[0] == one.removeprefix("gla_decay_layer_offset=1: ")
  done = CliRunner().invoke(app, [*monkey, "--decay-offset", "2"])
  assert done.exit_code == 2


@pytest.mark.parametrize("option", [0, "both"])
def test_two_values_for_one_setting(sure, option):
  words = ["gla_decay_layer_offset=1"]
  with pytest.raises(SavedModelError, match=f"--decay-offset {option} and gla_decay_layer_offset=1: two values"):
    if option == "both":
      compare_offsets.compare_offsets(sure, "text", overrides=words)
    else:
      evaluate.evaluate(sure, "text", overrides=words, decay_offset=option)


# What the folder says


@pytest.mark.parametrize("stated", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_folder_that_states_its_offset(sure, written, tmp_path, caplog, stated):
  folder, text = state_offset(sure, tmp_path / "hf", stated), text_of(written[stated])
  assert saved_model.open_model(folder, None, None, {}).config.gla_decay_layer_offset == stated
  same = [f"gla_decay_layer_offset={stated}"]
  assert saved_model.open_model(folder, None, None, {}, same).config.gla_decay_layer_offset == stated
  assert "gla_decay_layer_offset" not in caplog.text
  other = 1 - stated
  says = f"gla_decay_layer_offset={other}: config.json of .* trained with gla_decay_layer_offset={stated}; leave"
  with pytest.raises(CheckpointError, match=says):
    saved_model.open_model(folder, None, None, {}, [f"gla_decay_layer_offset={other}"])
  with pytest.raises(CheckpointError, match=says):
    evaluate.evaluate(folder, text, decay_offset=other)
  found = compare_offsets.compare_offsets(folder, text, length=LENGTH)
  assert (found.lower, found.stated, found.undecided) == (stated, stated, None)
  assert compare_offsets.verdict(found)[-1] == f"config.json says gla_decay_layer_offset={stated}."


def test_a_folder_that_does_not(sure, caplog):
  opened = saved_model.open_model(sure, None, None, {})
  assert opened.config.gla_decay_layer_offset == 0 and opened.stated_offset is None
  line = (
    f"{sure}: config.json has no gla_decay_layer_offset; using 0. To find out which one the weights were trained with: "
  )
  assert [record.message for record in caplog.records if record.name == "maxtext_ling2"] == [
    f"{line}`maxtext-ling2 eval {sure} --text FILE --decay-offset both`"
  ]
  assert decay_offset.unstated(sure, 0) == caplog.records[-1].message
