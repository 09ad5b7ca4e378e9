"""The bound of a round trip: a bare pyzmq ROUTER that answers, in a process of its own.

A request begins with the wished length of the answer (u32, little-endian), so that both ways can be as long as those
of the verb it is compared with. `python -P -m forebay.bench.echo ADDRESS`.
"""

from __future__ import annotations

import sys

import zmq

LENGTH_BYTES = 4


def serve(address: str) -> None:
    """Answer until killed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(address)
    answers: dict[bytes, bytes] = {}
    while True:
        identity = router.recv()
        request = router.recv()
        wished = request[:LENGTH_BYTES]
        answer = answers.get(wished)
        if answer is None:
            answer = answers[wished] = bytes(int.from_bytes(wished, "little"))
        router.send(identity, zmq.SNDMORE)
        router.send(answer)


if __name__ == "__main__":
    serve(sys.argv[1])
