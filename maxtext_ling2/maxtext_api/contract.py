"""What our own commands use of MaxText as a library, beside what the seams need. Only `doctor` checks it."""

from maxtext_ling2.host.contract import CommandExpectation, Expectation, Violation

NAME = "MaxText as a library"

EXPECTATIONS = (
  Expectation("maxtext.common.checkpointing:load_checkpoint_metadata", parameters=("checkpoint_dir_path",)),
  Expectation("maxtext.inference.maxengine.maxengine:MaxEngine.__init__", parameters=("config",)),
  Expectation(
    "maxtext.input_pipeline.tokenizer:build_tokenizer",
    parameters=("tokenizer_path", "tokenizer_type", "add_bos", "add_eos", "hf_access_token"),
  ),
  Expectation("maxtext.models.models:Transformer", holds=callable, meaning="the class of all models"),
  CommandExpectation("maxtext.trainers.pre_train.train_compile:main", parameters=("argv",)),
  Expectation(
    "maxtext.utils.accelerator_to_spec_map:UserFacingNameToSystemCharacteristics",
    holds=lambda value: "v5p-8" in value,
    meaning="a dict of topologies",
  ),
  Expectation("maxtext.utils.max_logging:log", parameters=("user_str",)),
  Expectation("maxtext.utils.max_logging:warning", parameters=("user_str",)),
  Expectation("maxtext.utils.maxtext_utils:get_mesh_from_config", parameters=("config",)),
  Expectation("maxtext.version:__version__", holds=lambda value: isinstance(value, str), meaning="a version"),
)


def violations() -> list[Violation]:
  """The expectations that the installed MaxText does not meet. Imports the modules concerned."""
  found = ((expectation, expectation.found()) for expectation in EXPECTATIONS)
  return [Violation(NAME, expectation.expected(), text) for expectation, text in found if text is not None]
