"""Pictures of the program on a terminal: it runs in a pseudo-terminal, is emulated with pyte and drawn with Pillow."""
