"""Methods whose product is a network."""
