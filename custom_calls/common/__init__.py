"""What the calls of one vendor share."""
