"""One rank: model, caches, experts and the step loop that drives them."""
