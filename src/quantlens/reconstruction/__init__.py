"""Parts that methods optimise with, each usable alone: bias correction, rounding, scales, blocks, equalisation."""
