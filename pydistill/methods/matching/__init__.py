"""Methods that match real and synthetic images on networks: gradients, features, attention maps, kernels."""
