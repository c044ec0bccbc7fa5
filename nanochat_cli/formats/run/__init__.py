"""Run folders: finding and creating them, their checkpoints, and the data set of each."""
