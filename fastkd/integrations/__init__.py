"""fastkd inside other libraries."""
