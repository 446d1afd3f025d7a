"""Hierarchical detectors that the ViTAE papers compare with: Swin or ViTAEv2 with an FPN."""
