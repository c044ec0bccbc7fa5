"""The configuration: schema, presets, files, `--set`, and the flat spellings of other projects. No torch."""
