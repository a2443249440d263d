"""``python -m rankopt``."""

from rankopt.cli.app import main

main()
