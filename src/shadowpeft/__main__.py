"""``python -m shadowpeft``, the same as the command ``shadowpeft``."""

from shadowpeft.cli import main

main()
