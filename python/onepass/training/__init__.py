"""What helps around an optimizer: groups, updates in the backward pass, logs, the search for a learning rate."""
