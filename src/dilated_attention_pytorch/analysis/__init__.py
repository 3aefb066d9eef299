"""What a model chose: recordings, statistics, diagnosis, plots and reports."""

from dilated_attention_pytorch.analysis.diagnosis import Diagnosis, diagnose
from dilated_attention_pytorch.analysis.distill_to_fixed import (
    DistilledPatterns,
    distill_to_fixed,
)
from dilated_attention_pytorch.analysis.head_kinds import HEAD_KINDS
from dilated_attention_pytorch.analysis.head_statistics import (
    HeadStatistics,
    head_statistics,
    pattern_stability,
)
from dilated_attention_pytorch.analysis.recorder import record
from dilated_attention_pytorch.analysis.recording import LayerRecord, Recording, SampleRecord

__all__ = [
    "HEAD_KINDS",
    "Diagnosis",
    "DistilledPatterns",
    "HeadStatistics",
    "LayerRecord",
    "Recording",
    "SampleRecord",
    "diagnose",
    "distill_to_fixed",
    "head_statistics",
    "pattern_stability",
    "record",
]
