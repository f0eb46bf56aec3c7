"""What makes the site from docs/ and the docstrings."""
