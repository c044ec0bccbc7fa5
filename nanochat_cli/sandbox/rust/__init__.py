"""Rust programs in the sandbox: rustc, test cases, and what a test may use of a program."""
