"""A Hugging Face tokenizer of bytes with a chat template in the manner of Ling's: role tags, an end of a turn."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|end|>", "<role>", "</role>", "<|turn|>"]
"""Ids 0 to 3; the end of a text, two of roles, the end of a turn."""

TEMPLATE = (
  "{% if messages[0].role != 'system' %}<role>SYSTEM</role>brief<|turn|>{% endif %}"
  "{% for message in messages %}"
  "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
  "<role>{{ message.role | upper }}</role>{{ message.content }}<|turn|>{% endfor %}"
  "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def write(folder, template=TEMPLATE, **files):
  """Writes the tokenizer's files, and others (name -> JSON) beside them; returns the folder."""
  vocabulary = {letter: i for i, letter in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
  tokenizer = Tokenizer(models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(SPECIAL)
  folder.mkdir(exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
  settings |= {} if template is None else {"chat_template": template}
  for name, values in {"tokenizer_config": settings, **files}.items():
    (folder / f"{name}.json").write_text(json.dumps(values))
  return folder


def ids(*parts):
  """The ids of texts and special tokens, written by hand: bytes are numbered in the order of ByteLevel's alphabet."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
  found = []
  for part in parts:
    if part in SPECIAL:
      found.append(SPECIAL.index(part))
    else:
      found += [len(SPECIAL) + letters.index(letter[byte]) for byte in part.encode()]
  return found
