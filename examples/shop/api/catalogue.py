"""What is on offer, and its stock."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, status

from shop import services
from shop.api.schemas import (
    CategoryView,
    Delivery,
    NewProduct,
    Problem,
    ProductView,
)
from shop.api.transaction import InTransaction

router = APIRouter(
    tags=["catalogue"], responses={status.HTTP_404_NOT_FOUND: {"model": Problem}}
)


@router.get("/categories", summary="List the categories")
async def categories(transaction: InTransaction) -> list[CategoryView]:
    return await transaction.many(CategoryView, services.categories)


@router.get("/categories/{slug}/products", summary="Browse a category")
async def browse(
    slug: str, transaction: InTransaction, in_stock: bool = False
) -> list[ProductView]:
    return await transaction.many(ProductView, services.browse, slug, in_stock=in_stock)


@router.post(
    "/products", status_code=status.HTTP_201_CREATED, summary="Put a product on offer"
)
async def add_product(product: NewProduct, transaction: InTransaction) -> ProductView:
    """Mark a product `hot` if a rush is expected: its buyers then queue for it."""
    return await transaction.one(
        ProductView, services.add_product, **product.model_dump()
    )


@router.get("/products/{product_id}", summary="Show a product")
async def product(product_id: UUID, transaction: InTransaction) -> ProductView:
    return await transaction.one(ProductView, services.product, product_id)


@router.post("/products/{product_id}/restock", summary="Add a delivery to the stock")
async def restock(
    product_id: UUID, delivery: Delivery, transaction: InTransaction
) -> ProductView:
    return await transaction.one(
        ProductView, services.restock, product_id, delivery.quantity
    )
