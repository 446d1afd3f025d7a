"""Hierarchical detectors for comparison with plain ones: Swin or ViTAEv2 with an FPN."""
