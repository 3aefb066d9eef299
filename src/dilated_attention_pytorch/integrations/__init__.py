"""Bridges to other libraries; each is imported explicitly and needs an extra."""
