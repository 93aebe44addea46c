"""Methods that pick real images."""
