"""The HTTP side: routes, the hub, viewers and the wires they watch by."""
