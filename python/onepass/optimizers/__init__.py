"""The optimizers, and what they share."""
