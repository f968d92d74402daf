"""Mixed precision: how sensitive every module is, what its bits cost, and the choice of widths under a budget."""
