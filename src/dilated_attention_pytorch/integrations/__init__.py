"""Callbacks and adapters for other libraries; each module needs its own."""
