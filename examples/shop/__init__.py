"""An order service over many PostgreSQL servers, written as for one.

Customers register, browse, fill a cart and place orders; an order takes stock where the
products live and writes the order where the customer lives, in one transaction. Read
in this order:

- ``models``: the tables; their ``info`` is all that the shop knows about shards;
- ``services``: the use cases, plain functions of a session;
- ``queries``: what pages and reports ask, as statements;
- ``api``: the same use cases over HTTP, asynchronously;
- ``data``: a shop of any size to try it on, from a seed;
- ``history``: half a year of orders for it;
- ``explain``: how typical statements are answered;
- ``invariants``: what must hold whatever happened, checked in plain SQL per server.
"""
