"""The operators, each a package: `api`, `reference` (the definition) and the implementations."""
