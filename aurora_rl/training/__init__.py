"""The learner: trains on trajectories and publishes weights that pass the gate."""
