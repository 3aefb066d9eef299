"""The interactive report: one self-contained HTML file."""

from dilated_attention_pytorch.analysis.report.page import Chart, render_report

__all__ = ["Chart", "render_report"]
