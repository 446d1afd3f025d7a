"""The generated data set of the demo, and masked-autoencoder pre-training on similar images."""
