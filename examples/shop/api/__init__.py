"""The shop over HTTP.

Every request is one transaction of one session. The use cases are the synchronous ones
of ``shop.services``; ``run_sync`` awaits at each statement they make, so that requests
overlap although no use case is written twice.
"""

from shop.api.app import create_app

__all__ = ["create_app"]
