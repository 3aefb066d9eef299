"""Sparse attention for pretrained models of Hugging Face transformers; needs the extra ``[hf]``."""

from dilated_attention_pytorch.hf.adapt import AdaptedModel, adapt
from dilated_attention_pytorch.hf.adapter import SelectorAdapter, load_adapter, save_adapter
from dilated_attention_pytorch.hf.adapter_file import AdapterError, AdapterWarning
from dilated_attention_pytorch.hf.attention import DenseBelow, register
from dilated_attention_pytorch.hf.calibration import calibrate, fit_low_rank
from dilated_attention_pytorch.hf.evaluate import Evaluation, EvaluationSettings
from dilated_attention_pytorch.hf.layer_shares import measure_costs
from dilated_attention_pytorch.hf.mask import plain_mask
from dilated_attention_pytorch.hf.model_folder import load_lora, tokenize
from dilated_attention_pytorch.hf.observe import CountTiles, diagnose_adapted, record_adapted
from dilated_attention_pytorch.hf.retrieval import RetrievalSettings, RetrievalSuite, build_task
from dilated_attention_pytorch.hf.train_selectors import distilled_config
from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig
from dilated_attention_pytorch.selection.layer_shares import SparsityCosts

__all__ = [
    "AdaptedModel",
    "AdapterError",
    "AdapterWarning",
    "CountTiles",
    "DenseBelow",
    "Evaluation",
    "EvaluationSettings",
    "RetrievalSettings",
    "RetrievalSuite",
    "SelectorAdapter",
    "SparsityCosts",
    "TrainingFreeConfig",
    "adapt",
    "build_task",
    "calibrate",
    "diagnose_adapted",
    "distilled_config",
    "fit_low_rank",
    "load_adapter",
    "load_lora",
    "measure_costs",
    "plain_mask",
    "record_adapted",
    "register",
    "save_adapter",
    "tokenize",
]
