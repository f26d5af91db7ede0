"""Cuts the recorded reference tensors down to what the tests compare: python tests/golden/make_oracle.py ORACLE_DIR.

The oracle's README says how they were recorded (official PyTorch code, float32). Kept as they are: config.json and
model.safetensors. Of the recordings: inputs, logits, losses, the output of each layer's attention and MLP, the chosen
experts, padding, packing and MTP. Of the gradients: those whose objective MTP's two-row error does not touch.
"""

import re
import shutil
import sys
from pathlib import Path

import numpy as np

KEEP = re.compile(
  r"(input_ids|labels|(eval|slope_noshift)\.(logits|loss)|eval\.embed|eval\.hidden_states|eval\.layer\d+\.(attn_out|mlp_out|topk_idx)"
  r"|train\.mtp_logits|mtp_loss_per_row_correct|b1\..*|pad\..*|pack\..*|inv_freq\..*|mla_softmax_scale)"
)
GRADIENTS = {"one_cycle": ("b1", "noshift"), "trailing_mtp": ("b1",)}


def main(source: Path, target: Path) -> None:
  for case, gradients in GRADIENTS.items():
    folder = target / case
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
      shutil.copyfile(source / case / name, folder / name)
    for length in ("short", "long"):
      with np.load(source / case / f"io_{length}.npz") as file:
        np.savez_compressed(folder / f"io_{length}.npz", **{k: file[k] for k in file.files if KEEP.fullmatch(k)})
    for kind in gradients:
      with np.load(source / case / f"grads_{kind}_short.npz") as file:
        np.savez_compressed(folder / f"grads_{kind}_short.npz", **{k: file[k] for k in file.files})


if __name__ == "__main__":
  main(Path(sys.argv[1]), Path(__file__).parent)
