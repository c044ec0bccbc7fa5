"""The command line: one file per subcommand. Each parses, checks what is cheap, and calls the Engine."""
