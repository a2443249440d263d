"""``python -m rankopt``."""

from rankopt.cli import main

main()
