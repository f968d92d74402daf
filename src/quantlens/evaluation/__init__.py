"""One model on image sets → a result: metrics, per-image outputs, the comparison of two results."""
