"""Text and progress on their way to a terminal."""
