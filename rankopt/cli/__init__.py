"""The command line: what commands share; they are in ``commands``."""

from rankopt.cli.app import app as app
from rankopt.cli.app import main as main
