"""Made-up tokenizers with chat templates of the forms that models have, and conversations with the loss that is expected.

The template LING has the form of Ling's: one SYSTEM header with the system prompt before everything, roles between
<role> and </role>, turns that end with <|role_end|>, and answers of tools in an OBSERVATION.
"""

import json
import re

SPECIAL = (
  "<pad>",
  "<s>",
  "</s>",
  "<role>",
  "</role>",
  "<|role_end|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|header|>",
  "<|eot|>",
)

_TURNS = """{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{ '<role>' + ('HUMAN' if message.role == 'user' else 'SYSTEM') + '</role>' + message.content + '<|role_end|>' }}
{%- elif message.role == 'assistant' -%}
{{ '<role>ASSISTANT</role>' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function.name + '</tool_call>' }}{% endfor -%}
{{ '<|role_end|>' }}
{%- elif message.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<role>OBSERVATION</role>' }}{% endif -%}
{{ '<tool_response>' + message.content + '</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|role_end|>' }}{% endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif -%}"""
_HEADER = """{{- '<role>SYSTEM</role>' + (messages[0].content + '\n' if messages[0].role == 'system' else '') -}}
{{- 'detailed thinking off<|role_end|>' -}}"""

_CHATML = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}BEFORE{{ message.content }}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
_EMPTY_THINK = "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"

LLAMA = """{{ bos_token }}{% for message in messages -%}
{{ '<|header|>' + message.role + '\n\n' + message.content | trim + '<|eot|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant\n\n' }}{% endif %}"""

TEMPLATES = {
  "ling": _HEADER + _TURNS,
  "chatml": _CHATML.replace("BEFORE", ""),
  "thinking": _CHATML.replace("BEFORE", _EMPTY_THINK),  # as Qwen3's, whose last turn differs from the others
  "llama": LLAMA,
}

WORDS = (
  "What is 1 and 2? It is 3. And one more? Be brief.",
  "Red, green, blue: which is it? No, not green. Yes.",
  "It is <tool_call>add</tool_call> detailed thinking off",
)


def tokenizer(name, template=None, lines_apart=True, **special):
  """A byte-level BPE tokenizer with a chat template; line ends are tokens of their own, as in most models' tokenizers."""
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
  from transformers import PreTrainedTokenizerFast

  built = Tokenizer(models.BPE())
  lines = [pre_tokenizers.Split(Regex("\n+"), "isolated")] if lines_apart else []
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=lines_apart)
  built.pre_tokenizer = pre_tokenizers.Sequence([*lines, to_bytes])
  built.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
  )
  built.train_from_iterator([*WORDS, *TEMPLATES.values(), *["\n\n"] * 9], trainer)
  tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", **special}
  return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=template or TEMPLATES[name], **tokens)


def says(*texts, system=None):
  """Messages that the user and the assistant say in turn."""
  roles = ["user", "assistant"] * len(texts)
  first = [] if system is None else [{"role": "system", "content": system}]
  return first + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


ONE = says("What is 1 and 1?", "It is 2.")
TWO = says("What is 1 and 1?", "It is 2.", "And one more?", "3.")
THREE = says("Red?", "No.", "Green?", "No, not green.", "Blue?", "Yes.")
SYSTEM = "Be brief."
CHATS = {"one": ONE, "two": TWO, "three": THREE}
CHATS |= {f"{name}, system": says(*(one["content"] for one in chat), system=SYSTEM) for name, chat in CHATS.items()}

_LING_OFF = "detailed thinking off<|role_end|>"
MARKED = {
  "ling": {
    "one": f"<role>SYSTEM</role>{_LING_OFF}<role>HUMAN</role>What is 1 and 1?<|role_end|><role>ASSISTANT</role>"
    "⟦It is 2.<|role_end|>⟧",
    "two": f"<role>SYSTEM</role>{_LING_OFF}<role>HUMAN</role>What is 1 and 1?<|role_end|><role>ASSISTANT</role>"
    "⟦It is 2.<|role_end|>⟧<role>HUMAN</role>And one more?<|role_end|><role>ASSISTANT</role>⟦3.<|role_end|>⟧",
    "three": f"<role>SYSTEM</role>{_LING_OFF}<role>HUMAN</role>Red?<|role_end|><role>ASSISTANT</role>⟦No.<|role_end|>⟧"
    "<role>HUMAN</role>Green?<|role_end|><role>ASSISTANT</role>⟦No, not green.<|role_end|>⟧"
    "<role>HUMAN</role>Blue?<|role_end|><role>ASSISTANT</role>⟦Yes.<|role_end|>⟧",
  },
  "chatml": {
    "one": "<|im_start|>user\nWhat is 1 and 1?<|im_end|>\n<|im_start|>assistant\n⟦It is 2.<|im_end|>\n⟧",
    "two": "<|im_start|>user\nWhat is 1 and 1?<|im_end|>\n<|im_start|>assistant\n⟦It is 2.<|im_end|>\n⟧"
    "<|im_start|>user\nAnd one more?<|im_end|>\n<|im_start|>assistant\n⟦3.<|im_end|>\n⟧",
    "three": "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>\n⟧"
    "<|im_start|>user\nGreen?<|im_end|>\n<|im_start|>assistant\n⟦No, not green.<|im_end|>\n⟧"
    "<|im_start|>user\nBlue?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>\n⟧",
  },
  "thinking": {
    "one": "<|im_start|>user\nWhat is 1 and 1?<|im_end|>\n<|im_start|>assistant\n"
    "⟦<think>\n\n</think>\n\nIt is 2.<|im_end|>\n⟧",
    "two": "<|im_start|>user\nWhat is 1 and 1?<|im_end|>\n<|im_start|>assistant\n⟦It is 2.<|im_end|>\n⟧"
    "<|im_start|>user\nAnd one more?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n3.<|im_end|>\n⟧",
    "three": "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>\n⟧"
    "<|im_start|>user\nGreen?<|im_end|>\n<|im_start|>assistant\n⟦No, not green.<|im_end|>\n⟧"
    "<|im_start|>user\nBlue?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nYes.<|im_end|>\n⟧",
  },
  "llama": {
    "one": "<s><|header|>user\n\nWhat is 1 and 1?<|eot|><|header|>assistant\n\n⟦It is 2.<|eot|>⟧",
    "two": "<s><|header|>user\n\nWhat is 1 and 1?<|eot|><|header|>assistant\n\n⟦It is 2.<|eot|>⟧"
    "<|header|>user\n\nAnd one more?<|eot|><|header|>assistant\n\n⟦3.<|eot|>⟧",
    "three": "<s><|header|>user\n\nRed?<|eot|><|header|>assistant\n\n⟦No.<|eot|>⟧"
    "<|header|>user\n\nGreen?<|eot|><|header|>assistant\n\n⟦No, not green.<|eot|>⟧"
    "<|header|>user\n\nBlue?<|eot|><|header|>assistant\n\n⟦Yes.<|eot|>⟧",
  },
}
"""Template -> conversation -> its text, with the loss between ⟦ and ⟧."""
_WITH_SYSTEM = {
  "ling": ("<role>SYSTEM</role>", "<role>SYSTEM</role>Be brief.\n"),
  "chatml": ("", "<|im_start|>system\nBe brief.<|im_end|>\n"),
  "thinking": ("", "<|im_start|>system\nBe brief.<|im_end|>\n"),
  "llama": ("<s>", "<s><|header|>system\n\nBe brief.<|eot|>"),
}
for _name, (_start, _instead) in _WITH_SYSTEM.items():
  MARKED[_name] |= {f"{chat}, system": _instead + text.removeprefix(_start) for chat, text in MARKED[_name].items()}


def marked(built, text):
  """(ids, loss mask) of a text with marks: [T] each. Tokenized as a whole; the marks are where tokens begin and end."""
  pieces = re.split("([⟦⟧])", text)
  plain = "".join(piece for piece in pieces if piece not in "⟦⟧" or not piece)
  ids, mask, inside = [], [], False
  for piece in pieces:
    if piece and piece in "⟦⟧":
      inside = piece == "⟦"
    elif piece:
      tokens = built(piece, add_special_tokens=False)["input_ids"]
      ids, mask = ids + tokens, mask + [inside] * len(tokens)
  assert ids == built(plain, add_special_tokens=False)["input_ids"]
  return ids, mask


def mask_of(chat):
  """The loss mask [T] of a `chats.Chat`."""
  return [any(start <= place < end for start, end in chat.turns) for place in range(len(chat.ids))]


def write(folder, conversations, kind="json"):
  """Writes conversations, one per row, in a column `messages`; returns the file."""
  folder.mkdir(parents=True, exist_ok=True)
  rows = [row if isinstance(row, dict) else {"messages": row} for row in conversations]
  if kind == "json":
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "chats.jsonl"
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "chats.parquet")
  return folder / "chats.parquet"
