"""Results -> figures: drawings that the report shows and that can be files of their own. Nothing is computed here that
is not in the results."""
