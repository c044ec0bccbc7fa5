"""The folder of a run: found, created, its checkpoints, and the data set that it belongs to."""
