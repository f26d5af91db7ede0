"""Without trust_remote_code the newest transformers must not build another model from an export: it has to raise.

Runs in a process that loads nothing with trust, so that no class of an export is registered. The tokenizer needs none.
"""

import contextlib
import os

import torch
import transformers
from rows import folders, row, row_of_all
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

VERSION = f"{transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
TEXT = "The for statement is used to iterate."
LOADERS = {
  "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
  "AutoModel": AutoModel.from_pretrained,
  "pipeline": lambda path: pipeline("text-generation", model=path),
}


def accepted(path):
  """What loads without trust, or fails with a text that does not say what to do."""
  for name, load in LOADERS.items():
    try:
      with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        yield f"{name} gives a {type(load(str(path))).__name__}"
    except Exception as error:  # each release has a class of its own for a file that is not there
      if "trust_remote_code" not in str(error):
        yield f"{name} raises {error!r}"


def other_text(path):
  """What the tokenizer makes of a text and of a chat, if it is not them."""
  tokenizer = AutoTokenizer.from_pretrained(path)
  decoded = tokenizer.decode(tokenizer.encode(TEXT))
  chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False)
  return "" if decoded == TEXT and TEXT in chat else f"{decoded!r}, {chat!r}"


for kind in ("exported", "saved"):
  found = folders(kind)
  what = f"{', '.join(LOADERS)} without trust"
  row_of_all(VERSION, what, "all raise", [(folder, "; ".join(accepted(folder.path))) for folder in found])
  row_of_all(VERSION, "AutoTokenizer, text and chat template", "same text", [(f, other_text(f.path)) for f in found])
native = type(AutoConfig.from_pretrained(folders("exported")[0].path))
row(VERSION, "exported: AutoConfig without trust", native.__name__, None)
