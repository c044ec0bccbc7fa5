"""Matched runs: plan, run, measure and judge training runs that differ in one thing."""
