"""`python -m curvcli` is `curv`."""

from curvcli.cli import main

main()
