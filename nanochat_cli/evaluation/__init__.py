"""How good a model is: bits per byte on held-out documents, and the problems that it solves."""
