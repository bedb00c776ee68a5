"""Training under PyTorch Lightning: the only place that imports it."""
