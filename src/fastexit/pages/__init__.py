"""A report as something to read: tables, a page, files for other tools."""
