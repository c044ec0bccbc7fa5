"""Running untrusted programs: limits, isolation, processes, and the two languages whose programs are judged."""
