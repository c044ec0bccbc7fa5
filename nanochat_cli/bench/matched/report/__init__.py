"""The report of matched runs: tables, pictures, Markdown and HTML."""
