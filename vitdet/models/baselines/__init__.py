"""Hierarchical backbones (Swin and ViTAEv2) and the FPN, for comparison with plain backbones."""
