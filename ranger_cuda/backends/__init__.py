"""The backends: each moves parameters by the rule, and all return the same bits."""
