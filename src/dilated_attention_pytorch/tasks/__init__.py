"""Tasks to train on: the needle task and real text."""
