"""What a model chose: statistics."""
