"""The pure core: state machines and codecs without clock, I/O or event loop."""
