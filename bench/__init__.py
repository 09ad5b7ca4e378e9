"""Benchmarks: what forebay's daemon and client reach on this machine, each figure beside the bound it is held against.

Run it with `forebay bench` or `python -P -m forebay.bench`. The top layer: it may import the daemon and the client,
nothing imports it. The daemon under test is a process of its own on a temporary runtime directory. docs/benchmarks.md
says what each figure means.
"""
