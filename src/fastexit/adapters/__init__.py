"""Hosts that fastexit plugs into, each behind its extra."""
