"""Traffic: prompts from a file, and generated ones."""
