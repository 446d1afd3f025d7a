"""Hierarchical detectors to which the ViTAE papers compare: Swin or ViTAEv2 with an FPN."""
