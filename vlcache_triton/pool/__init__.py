"""Where kept tokens lie: ragged caches, rings of windows, and the way of a prompt into them."""
