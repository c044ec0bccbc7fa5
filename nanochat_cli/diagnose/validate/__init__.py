"""The self-test: independent programs and backends must agree on what this toolkit computes."""
