"""Does this pair fit together? One check a file; each gives a `Finding` with figures and a remedy."""
