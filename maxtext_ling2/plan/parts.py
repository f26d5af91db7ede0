"""To which part of the model an instruction of a compiled train step belongs: the one whose source it comes from."""

from collections.abc import Callable, Iterable, Sequence

from maxtext_ling2.plan.operations import Operation

# The first whose words are all in the sources of an operation, "file:function" of each frame, is its part.
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
  ("router", ("model/moe.py:Router",)),
  ("shared expert", ("model/moe.py:Ling2MoE", "linears.py:MlpBlock")),
  ("experts", ("layers/moe.py",)),
  ("experts", ("ops/experts/",)),
  ("GLA", ("model/gla.py",)),
  ("MLA", ("attention_mla.py",)),
  ("dense MLP", ("linears.py:MlpBlock",)),
  ("logits and loss", ("apply_output_head",)),
  ("logits and loss", ("cross_entropy",)),
  ("gradient norms, AdamW", ("optax",)),
  ("gradient norms, AdamW", ("l2norm_pytree",)),
  ("MTP, besides", ("model/mtp.py",)),
  ("norms, residuals", ("model/layer.py",)),
  ("scan over layers", ("_apply_layers_sequentially",)),
)
# What the compiler names so and gives no source.
NAMES = {
  "experts": ("gmm", "tgmm", "experts_"),
  "MLA": ("splash",),
  "copies to the chip's memory": ("copy-start", "slice-start"),
}
COLLECTIVES, OTHER = "collectives", "other"

PartOf = Callable[[str, Sequence[str]], str]


def part(name: str, sources: Sequence[str]) -> str:
  """The part of the model that an instruction belongs to.

  Args:
    name: of the instruction.
    sources: "file:function" that it comes from, the innermost first.
  """
  text = "\n".join(sources)
  for found, words in PARTS:
    if all(word in text for word in words):
      return found
  return next((found for found, starts in NAMES.items() if name.startswith(starts)), OTHER)


def memory_by(operations: Iterable[Operation], part_of: PartOf = part) -> dict[str, float]:
  """{part: bytes from and to the HBM}, the largest first; collectives are a part of their own."""
  found: dict[str, float] = {}
  for one in operations:
    name = part_of_operation(one, part_of)
    found[name] = found.get(name, 0.0) + one.run_count * one.memory
  return dict(sorted(found.items(), key=lambda item: -item[1]))


def part_of_operation(one: Operation, part_of: PartOf = part) -> str:
  """As `part`; an operation that sends belongs to the collectives, whatever it comes from."""
  return COLLECTIVES if one.collectives else part_of(one.name, one.sources)
