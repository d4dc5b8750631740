"""Data layouts and their conversions: bytes and files in, tensors out; no modules."""
