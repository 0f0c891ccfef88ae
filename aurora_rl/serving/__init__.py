"""The inference server: requests, rounds and swaps, and HTTP in front of them."""
