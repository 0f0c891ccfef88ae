"""The inference server: requests, rounds and swaps."""
