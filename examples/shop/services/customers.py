"""Customers and their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID, uuid4

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from shardalchemy import ShardedSession as Session
from shop.errors import EmailTaken, NotFound
from shop.models import Address, Customer, EmailClaim


def register(session: Session, *, name: str, email: str) -> Customer:
    """Open an account; ``EmailTaken`` if the address already has one."""
    email = email.strip().lower()
    customer = Customer(id=uuid4(), name=name, email=email)
    session.add(EmailClaim(email=email, customer_id=customer.id))
    try:
        # The claim goes first and alone: of two customers who register one address
        # at the same moment, the second waits here for the first to commit.
        session.flush()
    except IntegrityError as error:
        raise EmailTaken(email) from error
    session.add(customer)
    session.flush()
    return customer


def customer(session: Session, customer_id: UUID) -> Customer:
    found = session.get(Customer, customer_id)
    if found is None:
        raise NotFound("customer", customer_id)
    return found


def locked_customer(session: Session, customer_id: UUID) -> Customer:
    """Return the customer once no other transaction is acting for them.

    A customer who clicks twice, or whose client retries, is served in turn.
    """
    found = session.get(
        Customer, customer_id, with_for_update=True, populate_existing=True
    )
    if found is None:
        raise NotFound("customer", customer_id)
    return found


def add_address(
    session: Session, customer_id: UUID, *, street: str, postal_code: str, city: str
) -> Address:
    address = Address(
        customer=customer(session, customer_id),
        street=street,
        postal_code=postal_code,
        city=city,
    )
    session.add(address)
    session.flush()
    return address


def addresses(session: Session, customer_id: UUID) -> Sequence[Address]:
    """Return the customer's addresses, oldest first."""
    customer(session, customer_id)
    return session.scalars(
        select(Address).where(Address.customer_id == customer_id).order_by(Address.id)
    ).all()
