"""This process among its peers: launch, collectives, a watch over the other ranks, weights divided over them."""
