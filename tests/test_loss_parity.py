"""The loss-parity report (examples/loss_parity.py) and the PyTorch model it compares with."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from examples import loss_parity

GOLDEN = Path(__file__).parent / "golden"
STEPS = 12  # of the recorded 100: past the warm-up, where steps are largest


@pytest.fixture(scope="module")
def run():
  return loss_parity.MaxTextRun(decay_offset=0)


@pytest.fixture(scope="module")
def case(run):
  return run.case()


@pytest.fixture(scope="module")
def recorded(case):
  return loss_parity.recorded(case)


@pytest.mark.slow
def test_maxtext_meets_the_bars(run, case, recorded):
  ours = run.train(case.tokens[:STEPS])
  differences = loss_parity.compare(ours, recorded["losses"]["0"])
  assert all(d.passed for d in differences.values()), differences
  other = loss_parity.compare(ours, recorded["losses"]["1"])  # the bars see which decay it was
  assert not any(d.passed for d in other.values()), other


@pytest.mark.slow
def test_maxtext_meets_the_bars_with_hugging_face_decay(recorded):
  run = loss_parity.MaxTextRun(decay_offset=1)
  differences = loss_parity.compare(run.train(run.case().tokens), recorded["losses"]["1"])
  assert all(d.passed for d in differences.values()), differences


def test_recording_has_all_steps_of_a_model_that_learns(recorded):
  for offset in loss_parity.DECAY_OFFSETS:
    for kind in loss_parity.KINDS:
      losses = recorded["losses"][str(offset)][kind]
      assert len(losses) == len(recorded["nudged"][str(offset)][kind]) == loss_parity.STEPS
      assert np.mean(losses[-10:]) < 0.9 * losses[0]


def test_recording_of_another_case_is_refused(case, tmp_path):
  content = json.loads(loss_parity.RECORDED.read_text())
  content["case"]["settings"]["learning_rate"] *= 2
  (tmp_path / "other.json").write_text(json.dumps(content))
  with pytest.raises(loss_parity.ParityError, match="another model, data or schedule"):
    loss_parity.recorded(case, tmp_path / "other.json")


def test_data_is_the_same_every_time():
  tokens = loss_parity.make_tokens()
  assert tokens.shape == (loss_parity.STEPS, 4, 65)
  assert tokens.dtype == np.int32
  np.testing.assert_array_equal(tokens, loss_parity.make_tokens())
  assert not np.array_equal(tokens[0], tokens[1])


@pytest.mark.parametrize(
  "step, off_by, passed", [(0, 0.9e-4, True), (0, 1.1e-4, False), (5, 0.9e-2, True), (5, 1.1e-2, False)]
)
def test_bars(step, off_by, passed):
  theirs = {kind: [4.0] * 11 for kind in loss_parity.KINDS}
  ours = {kind: list(losses) for kind, losses in theirs.items()}
  ours["mtp_loss"][step] *= 1 + off_by
  differences = loss_parity.compare(ours, theirs)
  assert differences["loss"] == loss_parity.Difference(0.0, 0.0, 0.0)
  assert differences["mtp_loss"].passed == passed
  assert differences["mtp_loss"].largest == pytest.approx(off_by)


def test_no_number_passes_no_bar():
  nan = {kind: [float("nan")] * 3 for kind in loss_parity.KINDS}
  assert not any(d.passed for d in loss_parity.compare(nan, nan).values())


@pytest.mark.parametrize("off_by, code, verdicts", [(0, 0, "ok ok ok ok"), (1e-2, 1, "MISSED ok MISSED ok")])
def test_report(tmp_path, monkeypatch, capsys, off_by, code, verdicts):
  """The table, the plot and the exit code, of recorded losses in the place of both trainings."""
  found = json.loads(loss_parity.RECORDED.read_text())

  class Run:
    def __init__(self, offset):
      self.losses = found["losses"][str(offset)]

    def case(self):
      return SimpleNamespace(tokens=loss_parity.make_tokens())

    def train(self, tokens):
      losses = {kind: np.array(values[: len(tokens)]) for kind, values in self.losses.items()}
      return losses | {"loss": losses["loss"] * (1 + off_by)}

  monkeypatch.setattr(loss_parity, "MaxTextRun", Run)
  monkeypatch.setattr(loss_parity, "recorded", lambda case: found)
  assert loss_parity.main(["--recorded", "--steps", "5", "--plot", str(tmp_path / "plot.png")]) == code
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[-1] for line in lines if line.endswith(("ok", "MISSED"))] == verdicts.split()
  assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.fixture
def torch():
  return pytest.importorskip("torch")


@pytest.mark.parametrize("offset, key", [(1, "eval"), (0, "slope_noshift")])
@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("folder", ["one_cycle", "trailing_mtp"])
def test_torch_model_is_the_recorded_reference(torch, folder, length, offset, key):
  with np.load(GOLDEN / folder / f"io_{length}.npz") as file:
    io = dict(file)
  output = _torch_model(folder, offset)(torch.from_numpy(io["input_ids"]).long())
  np.testing.assert_allclose(output.logits.detach().numpy(), io[f"{key}.logits"], atol=1e-4, rtol=0)
  if offset == 1 and output.mtp_logits:
    np.testing.assert_allclose(output.mtp_logits[0].detach().numpy(), io["train.mtp_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("folder", ["one_cycle", "trailing_mtp"])
def test_torch_gradients_are_the_recorded_ones(torch, folder):
  """Of loss + 0.1 MTP loss, first row. The embedding's padding row gets none in the official code."""
  from examples import torch_ling2

  with np.load(GOLDEN / folder / "io_short.npz") as file:
    ids, labels = (torch.from_numpy(file[key][:1]).long() for key in ("input_ids", "labels"))
  with np.load(GOLDEN / folder / "grads_b1_short.npz") as file:
    expected = dict(file)
  model = _torch_model(folder, 1)
  main, mtp = torch_ling2.losses(model(ids), torch_ling2.shifted(labels, fill=-100))
  gradients = torch.autograd.grad(main + 0.1 * mtp, list(model.parameters.values()))
  for name, gradient in zip(model.parameters, gradients, strict=True):
    ours, theirs = gradient.numpy(), expected[name]
    if name == "model.word_embeddings.weight":
      ours, theirs = ours[1:], theirs[1:]
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max(), err_msg=name)


def _torch_model(folder, offset):
  from safetensors.numpy import load_file

  from examples import torch_ling2

  config = json.loads((GOLDEN / folder / "config.json").read_text())
  return torch_ling2.Ling2(config, load_file(GOLDEN / folder / "model.safetensors"), offset)
