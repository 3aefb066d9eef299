"""What a model chose: recordings, statistics, diagnosis, plots and reports."""

from dilated_attention_pytorch.analysis.diagnosis import Diagnosis, diagnose
from dilated_attention_pytorch.analysis.distill_to_fixed import (
    DistilledPatterns,
    distill_to_fixed,
)
from dilated_attention_pytorch.analysis.recording import (
    LayerRecord,
    Recording,
    SampleRecord,
    record,
)
from dilated_attention_pytorch.analysis.report import Chart, render_report
from dilated_attention_pytorch.analysis.statistics import (
    HEAD_KINDS,
    HeadStatistics,
    head_statistics,
    pattern_stability,
)

__all__ = [
    "HEAD_KINDS",
    "Chart",
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
    "render_report",
]
