"""``python -m quantlens`` is the command line."""

from quantlens.cli.main import main

main()
