"""Training: the loop, its loss, checkpoints, and what watches over them."""
