"""The generated data set of the demo, and a masked autoencoder that is pre-trained on it."""
