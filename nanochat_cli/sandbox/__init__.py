"""Running untrusted programs: limits, isolation, processes, and a judge for each of two languages."""
