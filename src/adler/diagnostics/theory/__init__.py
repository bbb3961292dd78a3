"""What needs no data: activations, wide networks, and bounds that hold for all data."""
