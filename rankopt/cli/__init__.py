"""The command line: one command, one file."""

from rankopt.cli.app import app as app
from rankopt.cli.app import main as main
