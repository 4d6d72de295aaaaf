"""The command line: ``fastexit``."""

from fastexit.cli.parser import main as main
