"""A trace as columns: one row a line, numbers instead of text."""
