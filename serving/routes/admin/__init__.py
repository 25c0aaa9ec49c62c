"""The admin plane, one file per noun. Every route names the role it needs; the table is in docs/admin.md."""

from fastapi import APIRouter

from serving.routes.admin import adapters, audit, cases, keys, repairs

router = APIRouter(prefix="/admin")
for part in (adapters, cases, repairs, keys, audit):
    router.include_router(part.router)

__all__ = ["router"]
