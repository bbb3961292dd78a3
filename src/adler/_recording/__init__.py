"""Which batch made the gradient, and how its forward pass is run once more."""
