"""Detectors with hierarchical backbones, for comparison: Swin or ViTAEv2 with an FPN."""
