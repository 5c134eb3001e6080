"""Speed beside plain loops and beside PyTorch: ratios, measured in turns in one process."""
