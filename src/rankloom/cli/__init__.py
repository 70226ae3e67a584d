"""The command line: one file a command, each only parsing and printing; the work is done by the library."""

from rankloom.cli.app import app, main

__all__ = ["app", "main"]
