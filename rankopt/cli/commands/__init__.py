"""The commands: one command, one file, whose function has its name."""
