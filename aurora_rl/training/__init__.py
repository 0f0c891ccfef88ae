"""The training server: learns from trajectories and publishes weights that pass the gate."""
