"""A trace as columns: one row a line, numbers instead of text."""

from fastexit.records.read import read as read
