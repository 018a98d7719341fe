"""The derivative of a recorded solve: tangents forward, cotangents backward."""
