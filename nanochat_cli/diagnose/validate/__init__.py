"""Validation: independent programs and backends that must agree about what this toolkit computes."""
