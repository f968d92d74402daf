"""What a model looks at: rollout, class activation maps, outlier tokens, drift between precisions, and pictures."""
