"""The optimizers, and the modules that they share."""
