"""`python -m us3l` is the `us3l` command."""

from us3l.cli import main

main()
