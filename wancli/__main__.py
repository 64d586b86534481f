"""`python -m wancli`."""

from wancli.cli.app import main

main()
