"""What is on offer, and its stock."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, status

from shop import queries, services
from shop.api.schemas import (
    CategoryView,
    Delivery,
    NewProduct,
    Problem,
    ProductPage,
    ProductView,
)
from shop.api.transaction import InTransaction
from shop.queries.products import ProductOrder

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


@router.get("/products", summary="Search the products")
async def search(
    transaction: InTransaction,
    text: Annotated[str, Query(max_length=200, description="Words of a name.")] = "",
    category: Annotated[str | None, Query(description="A category's slug.")] = None,
    min_price: Annotated[int | None, Query(ge=0)] = None,
    max_price: Annotated[int | None, Query(ge=0)] = None,
    in_stock: bool = False,
    order: ProductOrder = ProductOrder.NAME,
    page: Annotated[int, Query(ge=1)] = 1,
    size: Annotated[int, Query(ge=1, le=100)] = 20,
) -> ProductPage:
    """A page past the last is empty."""
    query = queries.products.search(
        text=text,
        category_slug=category,
        min_price=min_price,
        max_price=max_price,
        in_stock=in_stock,
        order=order,
    )
    return await transaction.one(
        ProductPage, services.page, query, number=page, size=size
    )


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
