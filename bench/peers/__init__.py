"""What the relay is compared with: the ways that people build this otherwise."""
