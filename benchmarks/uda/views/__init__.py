"""What is made of kept runs: tables and pictures."""
