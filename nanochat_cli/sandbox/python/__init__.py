"""Python programs in the sandbox: the judge, and the scripts that run inside."""
