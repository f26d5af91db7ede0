"""MaxText's MaxEngine used by our own commands: prompts are prefilled into slots, and all slots decode together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.errors import Ling2Error


class EngineError(Ling2Error):
  """A prompt or a number of tokens does not fit the engine."""


class Engine:
  """A LING2 model in a MaxEngine.

  Args:
    config: MaxText config; `per_device_batch_size` x devices is the number of slots, prompts hold up to
      max_prefill_predict_length tokens, and max_target_length - max_prefill_predict_length tokens can follow.
    weights: arrays for all parameters and router biases by path in the model, in the config's layout; None: those of the
      checkpoint that `load_parameters_path` names.
    seed: seed of the sampling.
  """

  def __init__(self, config: Any, weights: Mapping[Any, Any] | None = None, seed: int = 0):
    import jax
    from maxtext.inference.maxengine import maxengine

    self.config = config
    self._engine = maxengine.MaxEngine(config)
    self._key = jax.random.key(seed)
    self.params = self._load(weights)
    self.slots = int(self._engine.max_concurrent_decodes)
    self.room = config.max_target_length - config.max_prefill_predict_length
    self._left: dict[int, int] = {}
    self._state = self._engine.init_decode_state(rng=self._next_key())

  def _load(self, weights: Mapping[Any, Any] | None) -> Any:
    """Loads the parameters; router biases, which are not parameters, go into MaxEngine's other state."""
    from flax import nnx

    if weights is None:
      return self._engine.load_params(rng=self._next_key())
    parameters = nnx.split(self._engine.model, nnx.Param, ...)[1]
    params = self._engine.load_params(params=_filled(parameters, weights), rng=self._next_key())
    self._engine._nnx_rest_state = _filled(self._engine._nnx_rest_state, weights)
    return params

  def prefill(self, tokens: Sequence[int], slot: int) -> tuple[int, NDArray[Any]]:
    """Prefills a slot with a prompt, replacing its content.

    Args:
      tokens: at least one token id.
      slot: 0 <= slot < slots.

    Returns:
      The token sampled after the prompt, and the logits [V] it was sampled from.

    Raises:
      EngineError: the prompt is empty or too long, or there is no such slot.
    """
    import jax.numpy as jnp

    length = self.config.max_prefill_predict_length
    if not 0 < len(tokens) <= length:
      raise EngineError(
        f"a prompt of {len(tokens)} tokens: it needs 1 to max_prefill_predict_length={length} tokens; shorten it or "
        "raise that"
      )
    if not 0 <= slot < self.slots:
      raise EngineError(f"slot {slot}: there are {self.slots}, counted from 0")
    padded = np.zeros(length, np.int32)
    padded[: len(tokens)] = tokens
    prefix, _ = self._engine.prefill(
      params=self.params, padded_tokens=jnp.asarray(padded), true_length=len(tokens), rng=self._next_key()
    )
    token, logits = int(np.asarray(prefix["tokens"])[0, 0]), np.asarray(prefix["logits"])[0, 0]
    self._state = self._engine.insert(prefix, self._state, slot=slot)
    self._left[slot] = self.room
    return token, logits

  def step(self, tokens: Mapping[int, int] | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Decodes one token in every slot.

    Args:
      tokens: by slot, tokens to continue with instead of those sampled last.

    Returns:
      The sampled tokens [slots], and the logits [slots, V] they were sampled from.

    Raises:
      EngineError: a slot in use has no room for another token; `free` it, or give it a new prompt.
    """
    full = [slot for slot, left in self._left.items() if left == 0]
    if full:
      raise EngineError(
        f"slots {full} have no room for another token: max_target_length={self.config.max_target_length} leaves "
        f"{self.room} after a prompt of up to max_prefill_predict_length={self.config.max_prefill_predict_length}; raise "
        "max_target_length"
      )
    for slot, token in (tokens or {}).items():
      self._state["tokens"] = self._state["tokens"].at[slot, 0].set(token)
    self._state, _ = self._engine.generate(self.params, self._state, rng=self._next_key())
    self._left = {slot: left - 1 for slot, left in self._left.items()}
    return np.asarray(self._state["tokens"])[:, 0], np.asarray(self._state["logits"])[:, 0]

  def free(self, slot: int) -> None:
    """Releases a slot; its outputs are undefined until its next prompt."""
    self._left.pop(slot, None)

  def stream(self, prompt: Sequence[int], count: int, stop: Sequence[int] = (), slot: int = 0) -> Iterator[int]:
    """Yields up to `count` tokens that follow a prompt, ending before one of `stop`."""
    token, _ = self.prefill(prompt, slot)
    try:
      for position in range(count):
        if token in stop:
          return
        yield token
        if position + 1 < count:
          token = int(self.step()[0][slot])
    finally:
      self.free(slot)

  def caches(self) -> dict[str, Any]:
    """The arrays of the decoding cache by path."""
    from flax.traverse_util import flatten_dict

    return {"/".join(map(str, path)): value for path, value in flatten_dict(self._state["cache"]).items()}

  def _next_key(self) -> Any:
    import jax

    self._key, key = jax.random.split(self._key)
    return key


def _filled(state: Any, weights: Mapping[Any, Any]) -> Any:
  """Replaces the values of a state's variables that have weights, in their own dtype and sharding."""
  import jax.numpy as jnp
  from flax import nnx

  def one(path: Any, variable: Any) -> Any:
    if path not in weights:
      return variable
    old = variable.get_value()
    return variable.replace(jnp.asarray(weights[path], old.dtype).reshape(old.shape))

  return nnx.from_flat_state([(path, one(path, variable)) for path, variable in nnx.to_flat_state(state)])
