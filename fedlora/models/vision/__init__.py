"""Image backbones: built, pretrained and probed."""
