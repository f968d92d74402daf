"""`python -m quantlens.zoo.experiment`."""

from quantlens.zoo.experiment.command import main

main()
