"""Methods that match the trajectories of experts: each outer step trains a student and compares where it ends."""
