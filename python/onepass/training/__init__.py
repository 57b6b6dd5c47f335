"""Tools for training: parameter groups, updates in the backward pass, logs, the learning rate range test."""
