"""The interactive report: one self-contained HTML file."""

from dilated_attention_pytorch.analysis.report.page import render_report

__all__ = ["render_report"]
