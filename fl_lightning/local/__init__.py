"""How one client works: loops, their data and memory, and the client half that ties them together."""
