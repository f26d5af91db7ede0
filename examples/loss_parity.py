"""Trains one tiny LING2 in MaxText and in PyTorch and compares their losses step by step.

    python examples/loss_parity.py                        100 steps for each decay offset; exit 1 if a bar is missed
    python examples/loss_parity.py --torch-python PYTHON  PyTorch lives in another environment, whose interpreter this is
    python examples/loss_parity.py --recorded             against the losses in benchmarks/results/loss_parity.json

MaxText's side is its own optimizer and train step with this plugin's model; PyTorch's is `torch_ling2.py`, which shares
no code with it. Both start from the weights that MaxText initialises, handed over under their Hugging Face names, and see
the same tokens in the same order, in float32. Where torch is absent, the recorded losses stand in for it.

Bars, for the loss and for MTP's: relative difference at step 0 at most 0.01 %, mean over all later steps at most 0.1 %.
Rounding errors grow while a mixture of experts trains. How much is in the column `nudged`: PyTorch against itself, from
weights that differ by one rounding error each.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
os.environ.setdefault("XLA_FLAGS", "--xla_dump_max_hlo_modules=0")  # unset, MaxText would have each program dumped

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RECORDED = ROOT / "benchmarks" / "results" / "loss_parity.json"
STEPS = 100
DECAY_OFFSETS = (0, 1)
FIRST_STEP_BAR, MEAN_BAR = 1e-4, 1e-3
KINDS = {"loss": "loss", "mtp_loss": "MTP loss"}

# Both kinds of attention and of MLP, MTP, and routing by groups; sizes that differ from each other where they can.
SETTINGS: dict[str, Any] = {
  "model_name": "ling2-tiny",
  "base_emb_dim": 48,
  "base_num_decoder_layers": 6,
  "inhomogeneous_layer_cycle_interval": 3,
  "base_num_query_heads": 4,
  "base_num_kv_heads": 4,
  "head_dim": 16,
  "base_mlp_dim": 96,
  "base_moe_mlp_dim": 32,
  "moe_shared_expert_dim": 64,
  "num_experts": 16,
  "num_experts_per_tok": 4,
  "q_lora_rank": 24,
  "kv_lora_rank": 32,
  "qk_nope_head_dim": 16,
  "qk_rope_head_dim": 8,
  "v_head_dim": 12,
  "vocab_size": 256,
  "max_target_length": 64,
  "per_device_batch_size": 4,
  "sparse_matmul": False,  # its kernel is for accelerators
  "steps": STEPS,
  "learning_rate_schedule_steps": STEPS,
  # Small enough for rounding errors not to grow past the bars: a token of 256 that another expert gets is seen in the
  # loss. At 3e-3 PyTorch is 0.2 % from itself with nudged weights.
  "learning_rate": 5e-4,
}
OPTIMIZATION = (
  "learning_rate", "learning_rate_final_fraction", "learning_rate_schedule_steps", "warmup_steps_fraction", "adam_b1",
  "adam_b2", "adam_eps", "adam_weight_decay", "gradient_clipping_threshold", "mtp_loss_scaling_factor",
  "routed_bias_update_rate",
)  # fmt: skip
"""What PyTorch takes from MaxText's config, beside the model's config.json."""

Losses = Mapping[str, Sequence[float]]


class ParityError(Exception):
  """The comparison cannot be made; the text says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Case:
  """What both sides are given.

  Attributes:
    tokens: [S, B, T + 1] int32.
    weights: MaxText's initial weights by Hugging Face name, float32.
    hf_config: config.json of the model.
    settings: `OPTIMIZATION`, from MaxText's config.
  """

  tokens: np.ndarray
  weights: Mapping[str, np.ndarray]
  hf_config: Mapping[str, Any]
  settings: Mapping[str, Any]

  def about(self) -> dict[str, Any]:
    """What a recording must agree in. The weights by their norm, whose last digits another processor may change."""
    norm = np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in self.weights.values()))
    tokens = hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()
    numbers = {"tokens_sha256": tokens, "weights_norm": round(float(norm), 4)}
    return {"hf_config": dict(self.hf_config), "settings": dict(self.settings), **numbers}


def make_tokens(steps: int = STEPS, batch: int = 4, length: int = 64, vocabulary: int = 256, seed: int = 0) -> np.ndarray:
  """Fresh rows for every step, [steps, batch, length + 1] int32: most tokens follow from the two before them."""
  random = np.random.RandomState(seed)  # whose numbers, unlike those of default_rng, numpy will never change
  first, second = random.permutation(vocabulary), random.permutation(vocabulary)
  rows = random.randint(1, vocabulary, (steps, batch, length + 1)).astype(np.int32)
  surprising = random.random_sample(rows.shape) < 0.2
  for t in range(2, length + 1):
    # Few enough different pairs (16 * 16) to be learnt in 100 steps.
    following = (first[rows[..., t - 1] % 16] + second[rows[..., t - 2] % 16]) % vocabulary
    rows[..., t] = np.where(surprising[..., t], rows[..., t], following)
  return rows


class MaxTextRun:
  """MaxText's model with its own initial weights, and its train step as its trainer would compile it."""

  def __init__(self, decay_offset: int):
    from maxtext_ling2.maxtext_api import session

    self.config = session.make_config(**{**session.FLOAT32_SETTINGS, **SETTINGS, "gla_decay_layer_offset": decay_offset})
    self.mesh = session.make_mesh(self.config)
    self._context = lambda: session.model_context(self.config, self.mesh)

    from flax import nnx
    from maxtext.common import train_state_nnx
    from maxtext.utils import model_creation_utils, train_utils

    with self._context():
      # Not jitted: that would compile for longer than all the small operations take.
      model = model_creation_utils.get_nnx_create_model_fn(self.config, self.mesh)()
      _, optimizer = train_utils.create_training_optimizer(self.config, model, mesh=self.mesh)
      train_state = train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, optimizer, wrt=nnx.Param))
    self._graph, self._state = nnx.split(train_state)

  def case(self) -> Case:
    """What PyTorch needs to train the same model on the same tokens."""
    from flax import nnx

    from maxtext_ling2.checkpoint import blocks, decay_offset, hf_config, stacking

    c, values = self.config, dict(nnx.to_flat_state(self._state["model"]))
    weights = {}
    for leaf in stacking.leaves(c):
      weights |= dict(blocks.unstack(leaf, np.asarray(values[leaf.path].get_value())))
    settings = {name: getattr(c, name) for name in OPTIMIZATION}
    tokens = make_tokens(STEPS, c.global_batch_size_to_load, c.max_target_length, c.vocab_size)
    config = hf_config.from_maxtext(c)
    del config[decay_offset.FIELD]  # the case is trained with each of them
    return Case(tokens, weights, config, settings)

  def train(self, tokens: np.ndarray) -> Losses:
    """One step for each of `tokens` [S, B, T + 1]; losses as `torch_ling2.train` returns them."""
    import jax
    from flax import nnx
    from maxtext.trainers.pre_train import train
    from maxtext.utils import maxtext_utils

    replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: replicated, nnx.filter_state(self._state["model"], nnx.Param))
    function, *_ = maxtext_utils.get_functional_train_with_signature(
      train.train_step, None, None, self._graph, self.config, shardings
    )
    step, scale = jax.jit(function), self.config.mtp_loss_scaling_factor
    losses: dict[str, list[float]] = {"loss": [], "mtp_loss": []}
    with self._context():
      for rows in tokens:
        self._state, metrics = step(self._state, _batch(rows))
        losses["loss"].append(float(metrics["scalar"]["learning/lm_loss"]))
        losses["mtp_loss"].append(float(metrics["scalar"]["learning/mtp_loss"]) / scale)
    return losses


def _batch(rows: np.ndarray) -> dict[str, np.ndarray]:
  """A batch as MaxText's pipelines make it of rows [B, T + 1] with one document each."""
  inputs, targets = rows[:, :-1], rows[:, 1:]
  positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
  segments = np.ones_like(inputs)
  return {
    "inputs": inputs,
    "targets": targets,
    "inputs_position": positions,
    "targets_position": positions,
    "inputs_segmentation": segments,
    "targets_segmentation": segments,
  }


def train_torch(case: Case, python: str) -> dict[str, Any]:
  """Trains the case in PyTorch, in a process of its own, so that the two frameworks' threads do not meet.

  Args:
    case: what to train, once for each of `DECAY_OFFSETS`.
    python: an interpreter that has torch.

  Returns:
    {"versions": .., "losses": {offset: losses}, "nudged": {offset: losses}}, the latter from nudged weights
  """
  with tempfile.TemporaryDirectory() as folder:
    given, written = Path(folder) / "case.npz", Path(folder) / "losses.json"
    about = {"hf_config": case.hf_config, "settings": case.settings, "decay_offsets": DECAY_OFFSETS}
    np.savez(given, tokens=case.tokens, about=json.dumps(about), **case.weights)
    command = [python, str(Path(__file__).with_name("torch_ling2.py")), str(given), str(written)]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if process.returncode:
      raise ParityError(f"the PyTorch half has failed in {python}:\n{process.stderr.strip()}")
    return json.loads(written.read_text())


def recorded(case: Case, path: Path = RECORDED) -> dict[str, Any]:
  """Recorded losses of this very case, in the form of `train_torch`.

  Raises:
    ParityError: the recording is of another case.
  """
  found, wanted = json.loads(path.read_text()), json.loads(json.dumps(case.about()))
  close = abs(found["case"].pop("weights_norm") - wanted.pop("weights_norm")) < 1e-3
  if found["case"] != wanted or not close:
    raise ParityError(f"{path} was recorded for another model, data or schedule; record it again: --record, with torch")
  return found


def record(case: Case, result: Mapping[str, Any], path: Path = RECORDED) -> None:
  """Writes PyTorch's losses, for machines without torch."""
  content = json.dumps({"case": case.about(), **result}, indent=1)
  path.write_text(content + "\n")


@dataclasses.dataclass(frozen=True)
class Difference:
  """Relative differences of one kind of loss.

  Attributes:
    first: at step 0.
    mean: mean over all later steps.
    largest: over all steps.
  """

  first: float
  mean: float
  largest: float

  @property
  def passed(self) -> bool:
    """Whether it is within both bars; NaN is not."""
    return bool(self.first <= FIRST_STEP_BAR and self.mean <= MEAN_BAR)


def compare(ours: Losses, theirs: Losses) -> dict[str, Difference]:
  """Differences by kind of loss, over the steps that `ours` has (at least two)."""
  differences = {}
  for kind in KINDS:
    a = np.asarray(ours[kind], np.float64)
    b = np.asarray(theirs[kind], np.float64)[: len(a)]
    relative = np.abs(a - b) / np.abs(b)
    differences[kind] = Difference(float(relative[0]), float(relative[1:].mean()), float(relative.max()))
  return differences


def plot(ours: Mapping[int, Losses], theirs: Mapping[str, Losses], path: Path) -> None:
  """Draws the losses of all runs and their relative differences into a PNG file."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 7), layout="constrained")
  axes = figure.subplots(2, len(ours), sharex=True, squeeze=False)
  for (offset, run), (upper, lower) in zip(ours.items(), axes.T, strict=True):
    for kind, name in KINDS.items():
      a = np.asarray(run[kind])
      b = np.asarray(theirs[str(offset)][kind])[: len(a)]
      (line,) = upper.plot(b, linewidth=4, alpha=0.4, label=f"{name}, PyTorch")
      upper.plot(a, linewidth=1, color=line.get_color(), label=f"{name}, MaxText")
      lower.semilogy(np.maximum(np.abs(a - b) / b, 1e-9), color=line.get_color(), label=name)
    lower.axhline(MEAN_BAR, color="black", linestyle="--", linewidth=1, label="bar of the mean, 0.1 %")
    upper.set(title=f"gla_decay_layer_offset={offset}", ylabel="loss (nats per token)")
    lower.set(xlabel="training step", ylabel="relative difference")
    for one in (upper, lower):
      one.grid(alpha=0.3)
      one.legend()
  figure.savefig(path, dpi=120)


def _table(differences: Mapping[int, Mapping[str, Difference]], noise: Mapping[int, Mapping[str, Difference]]) -> str:
  lines = [
    f"{'offset':<8}{'loss':<10}{'step 0':>11}{'mean, later':>13}{'largest':>11}{'nudged: mean':>14}{'largest':>11}"
  ]
  for offset, kinds in differences.items():
    for kind, d in kinds.items():
      own, verdict = noise[offset][kind], "ok" if d.passed else "MISSED"
      numbers = f"{d.first:>11.5%}{d.mean:>13.5%}{d.largest:>11.5%}{own.mean:>14.5%}{own.largest:>11.5%}"
      lines.append(f"{offset:<8}{KINDS[kind]:<10}{numbers}  {verdict}")
  lines.append(f"{'bar':<18}{FIRST_STEP_BAR:>11.2%}{MEAN_BAR:>13.2%}")
  return "\n".join(lines)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=STEPS, help=f"compare the first STEPS steps, 2 to {STEPS}")
  parser.add_argument("--torch-python", metavar="PYTHON", help="interpreter with torch; default: this one, if it has it")
  parser.add_argument("--recorded", action="store_true", help="read PyTorch's losses, even if torch is there")
  parser.add_argument("--record", action="store_true", help=f"write PyTorch's losses into {RECORDED.relative_to(ROOT)}")
  parser.add_argument("--plot", type=Path, default=Path("loss_parity.png"), help="the plot (%(default)s)")
  arguments = parser.parse_args(words)
  if not 2 <= arguments.steps <= STEPS:
    parser.error(f"--steps {arguments.steps}: from 2 to {STEPS}")
  if arguments.record and arguments.recorded:
    parser.error("--record writes what --recorded reads: give one of them")
  return arguments


def main(words: Sequence[str] | None = None) -> int:
  """Runs both halves, prints the table and draws the plot; 0 if every bar is met."""
  arguments = _arguments(words)
  has_torch = importlib.util.find_spec("torch") is not None
  python = arguments.torch_python or (sys.executable if has_torch else None)
  if arguments.record and python is None:
    raise ParityError("--record needs torch: pass --torch-python PYTHON, or install the extra `torch`")
  theirs: dict[str, Any] = {}
  ours, differences, noise = {}, {}, {}
  for offset in DECAY_OFFSETS:
    run = MaxTextRun(offset)
    if not theirs:
      case = run.case()  # the decay has no weights: both offsets start from the same
      start = time.perf_counter()
      theirs = recorded(case) if arguments.recorded or python is None else train_torch(case, python)
      how = "recorded" if "case" in theirs else f"trained in {time.perf_counter() - start:.0f} s"
      print(f"PyTorch {theirs['versions']['torch']}: {how}", flush=True)
      if arguments.record:
        record(case, theirs)
    start = time.perf_counter()
    ours[offset] = run.train(case.tokens[: arguments.steps])
    print(
      f"MaxText, decay offset {offset}: trained in {time.perf_counter() - start:.0f} s, compiling included", flush=True
    )
    differences[offset] = compare(ours[offset], theirs["losses"][str(offset)])
    nudged = {kind: losses[: arguments.steps] for kind, losses in theirs["nudged"][str(offset)].items()}
    noise[offset] = compare(nudged, theirs["losses"][str(offset)])
  print(_table(differences, noise))
  plot(ours, theirs["losses"], arguments.plot)
  print(f"plot: {arguments.plot}")
  return 0 if all(d.passed for kinds in differences.values() for d in kinds.values()) else 1


if __name__ == "__main__":
  try:
    sys.exit(main())
  except ParityError as problem:
    sys.exit(f"loss_parity: {problem}")
