"""`python -m smsd`."""

from smsd.cli import main

main()
