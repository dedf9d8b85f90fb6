"""Double-entry bookkeeping of orders.

Each function makes one or two postings of the order's total, and the payment that goes
with them. What a customer owes is ``customer:receivable``: a sale raises it, a charge
settles it; taking a sale back lowers it, a refund settles that.
"""

from __future__ import annotations

from shardalchemy import ShardedSession as Session
from shop.models import Account, LedgerEntry, Order, Payment, PaymentKind, Posting


def record_sale(session: Session, order: Order) -> None:
    """Book a placed order and the charge for it."""
    _post(session, order, Posting.SALE, Account.RECEIVABLE, Account.SALES)
    _pay(session, order, PaymentKind.CHARGE)
    _post(session, order, Posting.CHARGE, Account.CASH, Account.RECEIVABLE)


def reverse_sale(session: Session, order: Order) -> None:
    """Book a cancelled order as never sold, and pay the customer back."""
    _post(session, order, Posting.CANCELLATION, Account.SALES, Account.RECEIVABLE)
    _pay_back(session, order)


def record_refund(session: Session, order: Order) -> None:
    """Book a credit note over a sale that stands, and pay the customer back."""
    _post(session, order, Posting.CREDIT_NOTE, Account.REFUNDS, Account.RECEIVABLE)
    _pay_back(session, order)


def _pay_back(session: Session, order: Order) -> None:
    _pay(session, order, PaymentKind.REFUND)
    _post(session, order, Posting.REFUND, Account.RECEIVABLE, Account.CASH)


def _pay(session: Session, order: Order, kind: PaymentKind) -> None:
    # A payment provider would be asked here; this shop's customers always have cover.
    session.add(
        Payment(order=order, kind=kind, amount=order.total, currency=order.currency)
    )


def _post(
    session: Session, order: Order, posting: Posting, debit: Account, credit: Account
) -> None:
    for account, amount in ((debit, order.total), (credit, -order.total)):
        session.add(
            LedgerEntry(
                order=order,
                posting=posting,
                account=account,
                amount=amount,
                currency=order.currency,
            )
        )
