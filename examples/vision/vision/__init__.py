"""Image classification: a vision transformer, on images that torchvision reads and augments."""
