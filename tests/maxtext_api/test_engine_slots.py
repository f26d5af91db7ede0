"""Which slot a prompt gets and when, on an engine whose tokens are counted up instead of computed."""

import numpy as np
import pytest

from maxtext_ling2.maxtext_api.engine import Engine, padded_length

pytestmark = pytest.mark.unit


class Counting(Engine):
  """After the prompt [n] come 100 * n, 100 * n + 1 and so on."""

  def __init__(self, slots, room=50):
    self.slots, self.room, self._left = slots, room, {}
    self.last, self.prefilled = {}, []

  def prefill(self, tokens, slot):
    self._left[slot], self.last[slot] = self.room, 100 * tokens[0]
    self.prefilled.append((tokens[0], slot))
    return self.last[slot], None

  def advance(self, tokens=None):
    assert all(self._left.values())
    self._left = {slot: left - 1 for slot, left in self._left.items()}
    self.last = {slot: token + 1 for slot, token in self.last.items()}
    return np.array([self.last.get(slot, -1) for slot in range(self.slots)])


def test_prompts_wait_for_the_slot_that_is_free_first():
  engine, tokens = Counting(2), {}
  engine._left = {0: 0, 1: 0}  # both are full of earlier text
  ends = {0: 0, 1: 3, 2: 1, 3: 0, 4: 2}  # prompt -> position of its last token
  for index, token, last in engine.decode([[n + 1] for n in ends], lambda index, token: token % 100 == ends[index]):
    tokens.setdefault(index, []).append(token)
    assert last is (token % 100 == ends[index])
  assert tokens == {n: [100 * (n + 1) + i for i in range(count + 1)] for n, count in ends.items()}
  # Prompt 1 ends with its first token, 2 and 3 begin; 3 ends after one step and 4 takes its slot, then 5.
  assert engine.prefilled == [(1, 0), (2, 1), (3, 0), (4, 0), (5, 0)]
  assert engine._left == {}


def test_a_stream_replaces_what_is_in_its_slot():
  engine = Counting(1)
  engine.prefill([9], 0)
  assert list(engine.stream([3], 4)) == [300, 301, 302, 303]
  assert list(engine.stream([3], 4, stop=[302])) == [300, 301]
  assert list(engine.stream([3], 4, stop=[300])) == []


def test_slots_are_free_again_when_decoding_is_given_up():
  engine = Counting(2)
  pieces = engine.decode([[1], [2]], lambda index, token: False)
  assert [next(pieces) for _ in range(3)] == [(0, 100, False), (1, 200, False), (0, 101, False)]
  pieces.close()
  assert engine._left == {}


def test_padded_length():
  lengths = {1: 128, 128: 128, 129: 256, 513: 1024, 1024: 1024, 1025: 2048, 2049: 3072}
  assert {tokens: padded_length(tokens) for tokens in lengths} == lengths
