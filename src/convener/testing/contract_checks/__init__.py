"""The checks of the store contract, one module per group of keys; `convener.testing.contract` runs them."""
