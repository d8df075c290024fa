"""What a stream is: settings, errors, events, keys, the log and the claim."""
