"""Side-by-side measurements: ``python -m tests.bench`` prints the table.

Each row is measured in turn with its peers, in an order that changes, and given as
the median and its ratio to the peer named first. Nothing here fails on time.
``python -m tests.bench queries`` does so over many rows; ``stream`` measures memory.
"""
