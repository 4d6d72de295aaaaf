"""Modelled time: sourced costs of the stages of an exit, and the dispatcher that charges them."""
