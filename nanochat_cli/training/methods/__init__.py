"""Methods of training, one file each: what they do to a step, what they save, what they measure."""
