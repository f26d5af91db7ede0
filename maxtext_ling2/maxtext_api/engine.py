"""MaxText's MaxEngine used by our own commands: prompts are prefilled into slots, and all slots decode together."""

import collections
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.errors import Ling2Error


class EngineError(Ling2Error, ValueError):
  """A prompt or a number of tokens does not fit the engine."""


_SHORTEST, _LONGEST_POWER = 128, 1024


def padded_length(tokens: int) -> int:
  """The length to which a prompt of so many tokens is padded: a power of two from 128 to 1024, then multiples of 1024.

  Each length is a compiled program, so prompts of similar length share one.
  """
  if tokens <= _LONGEST_POWER:
    return max(_SHORTEST, 1 << (tokens - 1).bit_length())
  return -(-tokens // _LONGEST_POWER) * _LONGEST_POWER


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
    padded = np.zeros(min(length, padded_length(len(tokens))), np.int32)
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
    sampled = self.advance(tokens)
    return sampled, np.asarray(self._state["logits"])[:, 0]

  def advance(self, tokens: Mapping[int, int] | None = None) -> NDArray[Any]:
    """As `step`, without copying the logits from the device: the sampled tokens [slots]."""
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
    return np.asarray(self._state["tokens"])[:, 0]

  def free(self, slot: int) -> None:
    """Releases a slot; its outputs are undefined until its next prompt."""
    self._left.pop(slot, None)

  def decode(self, prompts: Sequence[Sequence[int]], ends: Callable[[int, int], bool]) -> Iterator[tuple[int, int, bool]]:
    """Decodes prompts together, one per slot, whose content is replaced; the others follow as slots become free.

    Args:
      prompts: each as for `prefill`.
      ends: called once for each token with the prompt's index and the token; True: it is the prompt's last one.

    Yields:
      The prompt's index, the token, and whether it is the last one.

    Raises:
      EngineError: see `prefill` and `step`.
    """
    self._left.clear()
    free = list(range(self.slots))
    waiting = collections.deque(enumerate(prompts))
    running: dict[int, int] = {}  # slot -> index of its prompt
    try:
      while waiting or running:
        fresh = []  # (slot, token)
        if waiting and free:  # one prompt at a time: it may end with its first token, and leave its slot to the next
          slot, (index, prompt) = free.pop(0), waiting.popleft()
          running[slot] = index
          fresh.append((slot, self.prefill(prompt, slot)[0]))
        else:
          tokens = self.advance()
          fresh = [(slot, int(tokens[slot])) for slot in running]
        for slot, token in fresh:
          index = running[slot]
          if last := ends(index, token):
            del running[slot]
            self.free(slot)
            free.append(slot)
          yield index, token, last
    finally:
      for slot in running:
        self.free(slot)

  def stream(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> Iterator[int]:
    """Yields up to `count` tokens that follow a prompt, ending before one of `stop`."""
    positions = itertools.count(1)
    for _, token, _ in self.decode([prompt], lambda _, token: token in stop or next(positions) == count):
      if token not in stop:
        yield token

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
