"""The side that produces: claims jobs and turns the upstream's answer into log entries."""
