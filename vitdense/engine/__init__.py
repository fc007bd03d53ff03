"""Training, evaluation and what they keep."""
