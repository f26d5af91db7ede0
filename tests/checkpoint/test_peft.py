"""An exported adapter on the exported base in peft computes what the merged export computes. Needs peft and PyTorch."""

import folders
import numpy as np
import pytest
from rich.console import Console
from test_adapter_folders import ALPHA, RANK, asking, factors, weights_to_adapt, write

from maxtext_ling2.checkpoint import conversion, lora

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft torch")
torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install peft torch")

pytestmark = pytest.mark.slow


def logits(model, ids):
  with torch.no_grad():
    return model(ids).logits.numpy()


def load(folder):
  from transformers import AutoModelForCausalLM

  return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.mark.parametrize("scan", [False, True], ids=["unscanned", "scanned"])
def test_adapter_on_the_base_is_the_merged_export(tmp_path, scan):
  base = folders.write(tmp_path / "hf", dtype="F32")
  config = folders.config(base, scan_layers=scan)
  tensors = factors(weights_to_adapt(config))
  theirs = write(tmp_path / "adapter", {name: 0.1 * tensor for name, tensor in tensors.items()})
  conversion.run(str(base), config, str(tmp_path / "base" / "0"), "float32", "", True, True)
  conversion.run("", config, str(tmp_path / "lora" / "0"), "float32", str(theirs), True, True)
  asked = asking(config, lora_restore_path=str(tmp_path / "lora" / "0"))
  lora.exporter("", asked).write(str(tmp_path / "peft"), None)
  quiet = Console(quiet=True)
  lora.exporter(str(tmp_path / "base" / "0"), asking(config)).run(tmp_path / "plain", "float32", None, quiet)
  lora.exporter(str(tmp_path / "base" / "0"), asked).run(tmp_path / "merged", "float32", None, quiet)

  ids = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, (2, 16)))
  plain, merged = (logits(load(tmp_path / name), ids) for name in ("plain", "merged"))
  assert np.abs(merged - plain).max() > 1e-2
  adapted = peft.PeftModel.from_pretrained(load(tmp_path / "plain"), tmp_path / "peft")
  layers = [module for module in adapted.modules() if isinstance(module, peft.tuners.lora.Linear)]
  assert len(layers) == len(tensors) // 2
  assert {layer.scaling["default"] for layer in layers} == {ALPHA / RANK}
  np.testing.assert_allclose(logits(adapted, ids), merged, atol=1e-5)
