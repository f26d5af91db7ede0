"""Memory and time of the gradient rule of GLA's plain JAX backend, compared with JAX's derivative of the same chunks.

    python benchmarks/gla_chunked.py

Memory is that of the compiled program without its arguments and results; the time is the best of several runs, the
variants alternating, on the device that JAX finds (the ratios matter).
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxtext_ling2.ops.gla import gla
from maxtext_ling2.ops.gla.base import GlaInputs
from maxtext_ling2.ops.gla.chunked import chunked

LENGTH, HEADS, DIM = 4096, 4, 128
ROUNDS = 7


def by_rule(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
  return gla(q, k, v, g, backend="chunked")[0]


def by_autodiff(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
  inputs = GlaInputs(q, k, v, g, None, None)
  return chunked().forward(inputs, scale=DIM**-0.5, output_final_state=False, save_residuals=False).o


def gradient(run: Callable[..., jax.Array], dtype: Any) -> Any:
  """The compiled gradient of a loss in q, k and v."""
  x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, DIM), dtype)
  g = jax.ShapeDtypeStruct((HEADS,), jnp.float32)

  def loss(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
    return (run(q, k, v, g).astype(jnp.float32) ** 2).sum()

  return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, g).compile()


def seconds(compiled: Any, args: tuple[jax.Array, ...]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(compiled(*args))
  return time.perf_counter() - start


def main() -> None:
  rng = np.random.default_rng(0)
  g = jnp.asarray(-np.geomspace(1e-3, 1, HEADS), jnp.float32)
  print(f"gradient of GLA, T={LENGTH} H={HEADS} D={DIM}, {jax.devices()[0].device_kind}")
  for dtype in (jnp.float32, jnp.bfloat16):
    args = (*(jnp.asarray(rng.normal(size=(1, LENGTH, HEADS, DIM)), dtype) for _ in range(3)), g)
    programs = {"rule": gradient(by_rule, dtype), "autodiff": gradient(by_autodiff, dtype)}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
      for name, program in programs.items():
        times[name].append(seconds(program, args))
    memory = {name: program.memory_analysis().temp_size_in_bytes / 2**20 for name, program in programs.items()}
    best = {name: min(values) for name, values in times.items()}
    spread = {name: statistics.median(values) / best[name] for name, values in times.items()}
    for name in programs:
      print(
        f"{dtype.__name__:9} {name:9} {memory[name]:8.1f} MiB {1e3 * best[name]:8.1f} ms (median {spread[name]:.2f} x)"
      )
    print(
      f"{dtype.__name__:9} autodiff / rule: memory {memory['autodiff'] / memory['rule']:.2f}, "
      f"time {best['autodiff'] / best['rule']:.2f}"
    )


if __name__ == "__main__":
  main()
