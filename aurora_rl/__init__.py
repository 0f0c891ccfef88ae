"""Speculative decoding that learns while it serves."""
