"""What the forward pass recorded, and where the backward pass gets the states from."""
