"""Accounts, addresses and carts."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, status

from shop import services
from shop.api.schemas import (
    AddressView,
    CartItemView,
    CartLineView,
    CartQuantity,
    CustomerView,
    NewAddress,
    Problem,
    Registration,
)
from shop.api.transaction import InTransaction

router = APIRouter(
    prefix="/customers",
    tags=["customers"],
    responses={status.HTTP_404_NOT_FOUND: {"model": Problem}},
)


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    summary="Register",
    responses={status.HTTP_409_CONFLICT: {"model": Problem}},
)
async def register(
    registration: Registration, transaction: InTransaction
) -> CustomerView:
    """Open an account; an e-mail address can have only one (409)."""
    return await transaction.one(
        CustomerView,
        services.register,
        name=registration.name,
        email=registration.email,
    )


@router.get("/{customer_id}", summary="Show a customer")
async def customer(customer_id: UUID, transaction: InTransaction) -> CustomerView:
    return await transaction.one(CustomerView, services.customer, customer_id)


@router.post(
    "/{customer_id}/addresses",
    status_code=status.HTTP_201_CREATED,
    summary="Add an address",
)
async def add_address(
    customer_id: UUID, address: NewAddress, transaction: InTransaction
) -> AddressView:
    return await transaction.one(
        AddressView,
        services.add_address,
        customer_id,
        street=address.street,
        postal_code=address.postal_code,
        city=address.city,
    )


@router.get("/{customer_id}/addresses", summary="List a customer's addresses")
async def addresses(customer_id: UUID, transaction: InTransaction) -> list[AddressView]:
    return await transaction.many(AddressView, services.addresses, customer_id)


@router.get("/{customer_id}/cart", summary="Show the cart at today's prices")
async def cart(customer_id: UUID, transaction: InTransaction) -> list[CartLineView]:
    return await transaction.many(CartLineView, services.cart, customer_id)


@router.put(
    "/{customer_id}/cart/{product_id}", summary="Set how many of a product to order"
)
async def put_in_cart(
    customer_id: UUID,
    product_id: UUID,
    item: CartQuantity,
    transaction: InTransaction,
) -> CartItemView:
    """Nothing is reserved: stock is taken when the order is placed."""
    return await transaction.one(
        CartItemView, services.put_in_cart, customer_id, product_id, item.quantity
    )


@router.delete(
    "/{customer_id}/cart/{product_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Take a product out of the cart",
)
async def remove_from_cart(
    customer_id: UUID, product_id: UUID, transaction: InTransaction
) -> None:
    await transaction.run(services.remove_from_cart, customer_id, product_id)
