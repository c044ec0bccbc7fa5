"""The cost of a run, from its configuration alone: parameters, FLOPs, memory, file size, time."""
