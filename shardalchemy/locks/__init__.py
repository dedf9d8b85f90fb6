"""Waiting for a hot row outside of PostgreSQL.

`turns` queues in Redis for a row's turn; `rows` takes the turn, then the row itself
``FOR UPDATE``. The row lock is what keeps the data correct: a turn that is lost, or a
Redis that is away, costs speed only.
"""

from shardalchemy.locks.rows import RowLocks

__all__ = ["RowLocks"]
