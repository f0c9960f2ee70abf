"""What gates multiply: stacked low-rank experts."""
