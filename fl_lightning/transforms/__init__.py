"""What updates pass through between client and server."""
