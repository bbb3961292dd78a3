"""The optimizers: one file each, over what they share (`base`)."""
