"""Output: what a person sees while a command runs, and the files that it leaves."""
