"""The steps from a model to a bundle, and the commands made of them."""
