"""The demo's generated data set, and the masked autoencoder that is pre-trained on it."""
