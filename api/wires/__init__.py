"""Wires: how events are rendered for one kind of client. Pure, a file each."""
