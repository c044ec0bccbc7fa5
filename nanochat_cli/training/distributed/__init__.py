"""Training by several processes: who computes, who owns, what travels, and how they start and end together."""
