"""Draws the loss curve."""

from pathlib import Path

from maxtext_ling2.stock_command.metrics import Losses


def draw(losses: Losses, mtp_scale: float, title: str, path: Path) -> None:
  """Draws losses over steps into a PNG file.

  Args:
    losses: losses to draw; MTP only if the model has it.
    mtp_scale: mtp_loss_scaling_factor; the MTP loss is divided by it, so that both are in nats per token.
    title: title of the plot.
    path: the file; an existing one is replaced.
  """
  # Not pyplot, which would pick a window system: Figure draws with Agg, also on machines without a display.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 5), layout="constrained")
  axes = figure.subplots()
  steps = losses.steps or range(len(losses.main))
  axes.plot(steps, losses.main, label="next token")
  if any(losses.mtp) and mtp_scale:
    axes.plot(steps, [loss / mtp_scale for loss in losses.mtp], label="the token after it (MTP)")
  axes.set(title=title, xlabel="training step", ylabel="loss (nats per token)")
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)
