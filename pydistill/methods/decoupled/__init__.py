"""Methods in steps: squeeze a network, recover images from it, relabel them, train a student on the labels."""
