"""The front's end of the ranks: processes, sockets, shared memory, and several machines."""
