"""A place for kernels of drafter training and tree attention. It holds none yet, and imports nothing of `aurora_rl`."""
