"""The sections of the configuration, torch-free: one file per component or method; `config.schema` composes them."""
