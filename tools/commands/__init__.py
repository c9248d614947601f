"""The command line: one file a command that is more than a call, and how results are shown."""
