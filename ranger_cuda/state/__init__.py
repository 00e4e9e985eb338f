"""What is kept for a parameter, how it is stored, checked and loaded."""
