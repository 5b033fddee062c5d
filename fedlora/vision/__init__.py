"""Images as data, domains made from them, and small backbones pretrained on images that no client sees."""
