"""What several test modules share: networks and data, the training loop, dense references."""
