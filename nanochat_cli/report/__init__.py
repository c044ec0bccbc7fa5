"""What a person sees while a command runs, and what is left in files afterwards."""
