"""The specification of every op in plain PyTorch: the oracle of the tests and the last resort of dispatch."""
