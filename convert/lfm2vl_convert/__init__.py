"""Converter from Hugging Face LFM2-VL checkpoints to the GGUF files that llama.cpp reads."""

from lfm2vl_convert.checkpoint import Checkpoint, checkpoint_folder, read_checkpoint
from lfm2vl_convert.convert import ConvertResult, convert_checkpoint, plan_conversion
from lfm2vl_convert.plan import Plan, TensorPlan
from lfm2vl_convert.verify import TensorError

__all__ = [
    "Checkpoint",
    "ConvertResult",
    "Plan",
    "TensorError",
    "TensorPlan",
    "checkpoint_folder",
    "convert_checkpoint",
    "plan_conversion",
    "read_checkpoint",
]
