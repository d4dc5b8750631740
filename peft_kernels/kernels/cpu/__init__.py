"""Thin calls into csrc/*.cpp."""
