"""The layers of the model, on plain local tensors with explicit collectives."""
