"""Weights on disk: the arithmetic of slices, safetensors files read and written slice by slice."""
