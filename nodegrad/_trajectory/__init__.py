"""Records the forward pass, and provides its states to the backward pass."""
