"""What each test of the suite runs, and which rows of its tables run nothing of their own."""
