"""Drafter checkpoints on disk, a file for each dialect."""
