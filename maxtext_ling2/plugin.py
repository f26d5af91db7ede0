"""Everything LING2 adds to MaxText, on one page. `register` is the entry point of the group `maxtext.plugins`.

It runs when `maxtext` is first imported, so it imports nothing heavy: the seams act later, each when MaxText's module is
imported, and the model's own classes are imported when MaxText builds the first LING2 model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxtext_ling2.configs import documents, validation
from maxtext_ling2.configs.fields import DEFAULTS, FIELDS
from maxtext_ling2.configs.validation import DECODER_BLOCK
from maxtext_ling2.host.registry import Registry
from maxtext_ling2.host.seams.compiler_options import CompilerOptionsSeam
from maxtext_ling2.host.seams.config_fields import ConfigFieldsSeam
from maxtext_ling2.host.seams.decoder_block import DecoderBlockSeam
from maxtext_ling2.host.seams.diloco import DilocoCheckpointSeam, DilocoSeam
from maxtext_ling2.host.seams.eval_metrics import EvalMetricsSeam
from maxtext_ling2.host.seams.flops import FlopsSeam
from maxtext_ling2.host.seams.hf_tables import HfTablesSeam
from maxtext_ling2.host.seams.mfu import MfuSeam
from maxtext_ling2.host.seams.mmap_documents import MmapDocumentsSeam
from maxtext_ling2.host.seams.mmap_pipeline import MmapPipelineSeam
from maxtext_ling2.host.seams.model_classes import ModelClassesSeam
from maxtext_ling2.host.seams.model_yml import ModelYmlSeam
from maxtext_ling2.host.seams.muon import MuonSeam
from maxtext_ling2.host.seams.quantization_rules import QuantizationRulesSeam
from maxtext_ling2.host.seams.result_tokens import ResultTokensSeam
from maxtext_ling2.host.seams.shared_expert import SharedExpertSeam
from maxtext_ling2.host.seams.to_huggingface import Exporter, ToHuggingFaceSeam
from maxtext_ling2.host.seams.to_maxtext import Request, Target, ToMaxTextSeam
from maxtext_ling2.host.seams.train_step import TrainStepSeam
from maxtext_ling2.host.seams.weight_variables import PretrainedWeightsSeam, WeightLoadingSeam, WeightVariablesSeam

CONFIGS = Path(__file__).parent / "configs"
MODEL_NAMES = tuple(sorted(path.stem for path in (CONFIGS / "models").glob("*.yml")))
TESTED_MAXTEXT = ("0.2.5",)


def _decoder() -> Any:
  from maxtext_ling2.model.decoder import Ling2Decoder

  return Ling2Decoder


def _mtp_block() -> Any:
  from maxtext_ling2.model.mtp import mtp_block

  return mtp_block


def _train_step(step: Any, config: Any) -> Any:
  from maxtext_ling2.training.step import wrap_train_step

  return wrap_train_step(step, config)


def _diloco_step(step: Any, config: Any) -> Any:
  from maxtext_ling2.training.diloco import with_equal_biases

  return with_equal_biases(step, config)


def _eval_step(step: Any, config: Any) -> Any:
  from maxtext_ling2.training.step import wrap_eval_step

  return wrap_eval_step(step, config)


def _compiler_options(config: Any, device: Any, flags: Mapping[str, str]) -> dict[str, str]:
  from maxtext_ling2.training.xla_flags import compiler_options

  return compiler_options(config, device, flags)


def _tflops(config: Any) -> tuple[float, float, float]:
  from maxtext_ling2.training.flops import training_tflops_per_device

  return training_tflops_per_device(config)


def _peak_flops(device: Any) -> float | None:
  from maxtext_ling2.plan.chips import peak_flops

  return peak_flops(device)


def _shared_expert_width(config: Any) -> int:
  return int(config.moe_shared_expert_dim or config.moe_mlp_dim)


def _tables() -> Mapping[str, Mapping[str, Any]]:
  from maxtext_ling2.checkpoint import stock_tables

  return stock_tables.tables({name: CONFIGS / "models" / f"{name}.yml" for name in MODEL_NAMES})


def _check_import(request: Request, config: Any, target: Target) -> None:
  from maxtext_ling2.checkpoint import commands

  commands.plan_import(request.folder, config, target.folder, request.save_dtype)


def _import(request: Request, config: Any, target: Target) -> None:
  from maxtext_ling2.checkpoint import commands

  commands.run_import(request.folder, config, target.folder, request.save_dtype, target.ocdbt, target.zarr3)


def _open_export(path: str, config: Any) -> Exporter:
  from maxtext_ling2.checkpoint import commands

  return commands.Exporter(path, config)


REGISTRY: Registry = Registry(
  "maxtext-ling2",
  seams=(
    DecoderBlockSeam("LING2", DECODER_BLOCK),
    ConfigFieldsSeam(
      FIELDS,
      MODEL_NAMES,
      {"MaxTextConfig": validation.validate, "RLConfig": validation.validate_rl},
      validation.shown_to_maxtext,
      lambda config: REGISTRY.require_for(config),
    ),
    ModelYmlSeam(CONFIGS, MODEL_NAMES, DEFAULTS, DECODER_BLOCK, validation.INSTEAD_OF_BASE),
    SharedExpertSeam(DECODER_BLOCK, _shared_expert_width),
    FlopsSeam(DECODER_BLOCK, _tflops),
    TrainStepSeam(DECODER_BLOCK, _train_step, _eval_step),
    DilocoSeam(DECODER_BLOCK, _train_step, _diloco_step),
    CompilerOptionsSeam(DECODER_BLOCK, _compiler_options),
    MmapDocumentsSeam(DECODER_BLOCK, documents.inserts_bos),
    MmapPipelineSeam(DECODER_BLOCK),
    EvalMetricsSeam(("evaluation/moe_z_loss", "evaluation/raw_mtp_loss")),
    MfuSeam(DECODER_BLOCK, _peak_flops),
    ModelClassesSeam(DECODER_BLOCK, _decoder, _mtp_block),
    QuantizationRulesSeam(DECODER_BLOCK),
    WeightVariablesSeam(),
    WeightLoadingSeam(),
    DilocoCheckpointSeam(DECODER_BLOCK, ("gate", "bias")),
    PretrainedWeightsSeam(DECODER_BLOCK, "routed_bias", ("gate", "bias")),
    MuonSeam(("query_key_value", "output_gate")),
    ResultTokensSeam(),
    HfTablesSeam(_tables),
    ToMaxTextSeam(DECODER_BLOCK, _check_import, _import),
    ToHuggingFaceSeam(DECODER_BLOCK, _open_export),
  ),
  names=(*MODEL_NAMES, DECODER_BLOCK),
  tested=TESTED_MAXTEXT,
)


def register() -> None:
  """Arranges for MaxText to be extended as its modules are imported. Idempotent."""
  REGISTRY.install()
