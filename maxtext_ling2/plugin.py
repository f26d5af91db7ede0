"""Everything LING2 adds to MaxText, on one page. `register` is the entry point of the group `maxtext.plugins`.

It runs when `maxtext` is first imported, so it imports nothing heavy: the seams act later, each when MaxText's module is
imported, and what they call of ours is imported when it is first called.
"""

from pathlib import Path
from typing import Any

from maxtext_ling2.configs import post_training
from maxtext_ling2.configs.validation import DECODER_BLOCK
from maxtext_ling2.host.interrupt import say_in_one_line
from maxtext_ling2.host.lazy import Lazy
from maxtext_ling2.host.registry import Registry
from maxtext_ling2.host.seams.chats import ChatErrorsSeam, GrainChatsSeam, HfChatsSeam
from maxtext_ling2.host.seams.checkpoint_report import CheckpointReportSeam
from maxtext_ling2.host.seams.compiler_options import CompilerOptionsSeam
from maxtext_ling2.host.seams.config_fields import ConfigFieldsSeam
from maxtext_ling2.host.seams.decoder_block import DecoderBlockSeam
from maxtext_ling2.host.seams.diloco import DilocoCheckpointSeam, DilocoSeam
from maxtext_ling2.host.seams.engine_quantization import EngineQuantizationSeam
from maxtext_ling2.host.seams.eval_metrics import EvalMetricsSeam
from maxtext_ling2.host.seams.flops import FlopsSeam
from maxtext_ling2.host.seams.former_names import FormerNamesErrorSeam, FormerNamesSeam
from maxtext_ling2.host.seams.hf_tables import HfTablesSeam
from maxtext_ling2.host.seams.lora import LoraSeam
from maxtext_ling2.host.seams.metrics_file import MetricsFileSeam
from maxtext_ling2.host.seams.mfu import MfuSeam
from maxtext_ling2.host.seams.mmap_documents import MmapDocumentsSeam
from maxtext_ling2.host.seams.mmap_pipeline import MmapPipelineSeam
from maxtext_ling2.host.seams.model_classes import ModelClassesSeam
from maxtext_ling2.host.seams.model_yml import ModelYmlSeam
from maxtext_ling2.host.seams.muon import MuonSeam
from maxtext_ling2.host.seams.post_training import PostTrainingSeam
from maxtext_ling2.host.seams.quantization_rules import QuantizationRulesSeam
from maxtext_ling2.host.seams.result_tokens import ResultTokensSeam
from maxtext_ling2.host.seams.shared_expert import SharedExpertSeam
from maxtext_ling2.host.seams.stacked_axes import StackedAxesSeam
from maxtext_ling2.host.seams.stop import StopSeam
from maxtext_ling2.host.seams.to_huggingface import ToHuggingFaceSeam
from maxtext_ling2.host.seams.to_maxtext import ToMaxTextSeam
from maxtext_ling2.host.seams.train_step import TrainStepSeam
from maxtext_ling2.host.seams.weight_variables import PretrainedWeightsSeam, WeightLoadingSeam, WeightVariablesSeam
from maxtext_ling2.host.trainer import running_trainer
from maxtext_ling2.model.layer_layout import FORMER_NAMES, GLA_LAYERS, ROUTER_BIAS

CONFIGS = Path(__file__).parent / "configs"
MODEL_YMLS = {path.stem: path for path in sorted((CONFIGS / "models").glob("*.yml"))}
MODEL_NAMES = tuple(MODEL_YMLS)
TESTED_MAXTEXT = ("0.2.5",)

_IMPORT = "maxtext_ling2.checkpoint.conversion"
_TRAIN_STEP = Lazy("maxtext_ling2.training.step:wrap_train_step")

REGISTRY: Registry = Registry(
  "maxtext-ling2",
  seams=(
    DecoderBlockSeam(),
    ConfigFieldsSeam(MODEL_NAMES, lambda config: _on_config(config)),
    ModelYmlSeam(CONFIGS, MODEL_NAMES),
    SharedExpertSeam(),
    FlopsSeam(Lazy("maxtext_ling2.training.flops:training_tflops_per_device")),
    TrainStepSeam(_TRAIN_STEP, Lazy("maxtext_ling2.training.step:wrap_eval_step")),
    DilocoSeam(_TRAIN_STEP, Lazy("maxtext_ling2.training.diloco:with_equal_biases")),
    CompilerOptionsSeam(Lazy("maxtext_ling2.training.xla_flags:compiler_options")),
    MmapDocumentsSeam(),
    MmapPipelineSeam(),
    GrainChatsSeam(),
    HfChatsSeam(),
    ChatErrorsSeam(),
    StopSeam(),
    CheckpointReportSeam(),
    EvalMetricsSeam(),
    MetricsFileSeam(),
    MfuSeam(Lazy("maxtext_ling2.plan.chips:peak_flops")),
    ModelClassesSeam(Lazy("maxtext_ling2.model.decoder:Ling2Decoder"), Lazy("maxtext_ling2.model.mtp:mtp_block")),
    QuantizationRulesSeam(),
    LoraSeam(),
    WeightVariablesSeam(),
    WeightLoadingSeam(),
    FormerNamesSeam(FORMER_NAMES),
    DilocoCheckpointSeam(ROUTER_BIAS),
    PretrainedWeightsSeam(ROUTER_BIAS),
    FormerNamesErrorSeam(FORMER_NAMES),
    PostTrainingSeam(),
    MuonSeam(),
    ResultTokensSeam(),
    EngineQuantizationSeam(),
    HfTablesSeam(Lazy("maxtext_ling2.checkpoint.stock_tables:tables"), MODEL_YMLS),
    StackedAxesSeam(GLA_LAYERS),
    ToMaxTextSeam(Lazy(f"{_IMPORT}:check"), Lazy(f"{_IMPORT}:run")),
    ToHuggingFaceSeam(Lazy("maxtext_ling2.checkpoint.lora:exporter")),
  ),
  names=(*MODEL_NAMES, DECODER_BLOCK),
  tested=TESTED_MAXTEXT,
)


def _on_config(config: Any) -> None:
  """What is asked of a LING2 config that keeps LING2's rules: that its seams are there and its trainer can do it."""
  REGISTRY.require_for(config)
  trainer = running_trainer()
  post_training.check(config, trainer)
  if trainer is not None:
    say_in_one_line(config)


def register() -> None:
  """Arranges for MaxText to be extended as its modules are imported. Idempotent."""
  REGISTRY.install()
