"""What our own commands use of MaxText as a library, beside what the seams need. Only `doctor` checks it."""

from maxtext_ling2.host.contract import CommandExpectation, Expectation, Violation, expect, unmet

NAME = "MaxText as a library"

EXPECTATIONS = (
  *expect("maxtext.common.checkpointing", "load_checkpoint_metadata(checkpoint_dir_path)"),
  *expect("maxtext.inference.maxengine.maxengine", "MaxEngine.__init__(config)"),
  *expect("maxtext.input_pipeline.input_pipeline_interface", "create_data_iterator(config, mesh)"),
  *expect(
    "maxtext.input_pipeline.tokenizer",
    "build_tokenizer(tokenizer_path, tokenizer_type, add_bos, add_eos, hf_access_token)",
  ),
  Expectation("maxtext.models.models:Transformer", holds=callable, meaning="the class of all models"),
  *expect("maxtext.trainers.pre_train.train_compile", "get_topology_mesh(config)"),
  CommandExpectation("maxtext.trainers.pre_train.train_compile:main", parameters=("argv",)),
  Expectation(
    "maxtext.utils.accelerator_to_spec_map:UserFacingNameToSystemCharacteristics",
    holds=lambda value: "v5p-8" in value,
    meaning="a dict of topologies",
  ),
  *expect("maxtext.utils.max_logging", "log(user_str)", "warning(user_str)"),
  *expect("maxtext.utils.maxtext_utils", "get_mesh_from_config(config)"),
  Expectation("maxtext.version:__version__", holds=lambda value: isinstance(value, str), meaning="a version"),
)


def violations() -> list[Violation]:
  """The expectations that the installed MaxText does not meet. Imports the modules concerned."""
  return unmet(NAME, EXPECTATIONS)
