"""Thin calls into csrc/*.cu."""
