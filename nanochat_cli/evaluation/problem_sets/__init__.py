"""Problem sets that come with nanochat, as data: one JSON line per problem, read by `evaluation.problems`."""
