"""record_internal_nn_metrics: what MaxText logs of the output of each layer; test_scan.py compares scanned layers."""

import jax
import numpy as np
import pytest

from maxtext_ling2.model.layer import Ling2DecoderLayer
from tiny import Run, batch

SETTINGS = {
  "base_num_decoder_layers": 12,
  "first_num_dense_layers": 12,
  "mtp_num_layers": 1,
  "opt_type": "sgd",
  "learning_rate": 0.0,
}
SETTINGS |= {"record_internal_nn_metrics": 1, "routed_bias_update_rate": 0.0}


def outputs(run, data):
  """The output [B, T, C] of each decoder layer."""
  seen = {}
  original = Ling2DecoderLayer.__call__

  def keep(self, *args, **kwargs):
    y, cache = original(self, *args, **kwargs)
    if self.layer_idx is not None:  # MTP's has none
      # A copy: the array that a callback is given may be in memory that is used again after it.
      jax.debug.callback(lambda value, index: seen.__setitem__(int(index), np.array(value)), y, self.layer_idx)
    return y, cache

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Ling2DecoderLayer, "__call__", keep)
    run.forward(data)
  return [seen[index] for index in range(run.config.num_decoder_layers)]


@pytest.mark.slow  # test_scan.py compares these metrics of scanned and unscanned layers
def test_every_layer_in_its_place():
  """With more than ten layers, whose names are not in the order of their numbers."""
  run = Run(**SETTINGS)
  data = batch(run.config)
  metrics = run.step(data)
  layers = outputs(run, data)
  for index, y in enumerate(layers):
    for kind, expected in (("mean", y.mean()), ("stdev", y.std()), ("fraction_zero", (y == 0).mean())):
      found = metrics[f"activ_{kind}/layer_{index:03d}"]
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=f"{kind} {index}")
  assert sum(name.startswith("activ_") for name in metrics) == 3 * len(layers)


def test_mean_over_microbatches():
  small = SETTINGS | {"base_num_decoder_layers": 2, "first_num_dense_layers": 1, "mtp_num_layers": 0}
  half = Run(per_device_batch_size=2, **small)
  both = Run(per_device_batch_size=2, gradient_accumulation_steps=2, **small)
  data = batch(both.config)
  parts = [half.step({name: value[m::2] for name, value in data.items()}) for m in range(2)]
  metrics = both.step(data)
  names = [name for name in metrics if name.startswith("activ_")]
  assert len(names) == 6
  for name in names:
    np.testing.assert_allclose(metrics[name], np.mean([part[name] for part in parts]), rtol=1e-5, atol=1e-7, err_msg=name)
