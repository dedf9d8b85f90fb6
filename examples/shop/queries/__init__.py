"""What the shop's pages and reports ask of the database, as statements.

A query is a function that returns a ``Select``. It opens no connection and knows no
shard: the same statement is answered by one server or by many. ``services.rows`` and
``services.page`` run them, ``shop.explain`` shows how.

- ``orders``: a customer's orders, the latest of all;
- ``products``: the search, what is running out, what nobody buys;
- ``customers``: who buys most, who has stopped, who came back;
- ``sales``: what was sold, by product, day and category; the average basket.

Every order is total, by an id at last, so that pages neither repeat nor lose a row.
Only orders that were neither cancelled nor refunded are sales, and amounts of one
report are in one currency.
"""

from shop.queries import customers, orders, products, sales

__all__ = ["customers", "orders", "products", "sales"]
