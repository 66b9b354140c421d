"""`python -m flows` is `sia`."""

from flows.cli import main

main()
