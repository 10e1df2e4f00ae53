"""Tokenized data: Megatron's files, samples, order."""
