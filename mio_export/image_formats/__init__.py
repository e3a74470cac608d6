"""What Pillow does not do for image files: which formats are read, claimed sizes, orientation, PNG chunks."""
