"""PyTorch matmuls in the fewest passes, on any device: what runs where no fused kernel was measured to win."""
