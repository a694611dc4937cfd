"""`python -m kerasmed` is the `kerasmed` command."""

from kerasmed.cli import main

main()
