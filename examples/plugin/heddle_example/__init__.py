"""A mixer for Heddle from a package of its own: one schema file, one module file, one line in pyproject.toml."""
