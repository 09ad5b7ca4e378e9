"""How messages and handles travel: ZeroMQ, the session socket, shared memory."""
