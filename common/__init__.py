"""The vocabulary every service shares. Imports no service and never torch."""
