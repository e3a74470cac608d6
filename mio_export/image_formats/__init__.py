"""Image files below Pillow: which formats are read, what size a file claims, which way up it lies, PNG's chunks."""
